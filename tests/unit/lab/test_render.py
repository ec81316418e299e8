"""Pictures: the same bytes for the same scene, and every attribute visible in the pixels."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from dpa.lab.render import IMAGE_SIDE, PALETTE, render
from dpa.lab.scenes import BACKGROUNDS, COLOURS, GRID, SHAPES, SIZES, TEXTURES, Scene, Thing, draw_scene

CELL = IMAGE_SIDE // GRID
MIDDLE = Thing(row=1, column=1, shape="circle", colour="red", size="large", texture="plain")


def pixels(scene: Scene) -> np.ndarray:
    return np.asarray(render(scene)).astype(float)


def difference(one: Scene, other: Scene) -> np.ndarray:
    """Largest difference over the colour channels, per pixel."""
    return np.abs(pixels(one) - pixels(other)).max(-1)


def test_size_mode_and_same_pixels_again() -> None:
    for index in range(20):
        scene = draw_scene(3, index)
        picture = render(scene)
        assert picture.mode == "RGB"
        assert picture.size == (IMAGE_SIDE, IMAGE_SIDE)
        assert picture.tobytes() == render(scene).tobytes()


def test_what_captions_cannot_say_depends_on_the_key_alone() -> None:
    scene = Scene("1/1", "light", (MIDDLE,))
    assert difference(scene, replace(scene, key="1/2")).max() > 10
    # Another attribute of one thing moves no other thing and leaves the light alone.
    corner = Thing(row=0, column=0, shape="star", colour="blue", size="small", texture="dotted")
    one = replace(scene, things=(corner, MIDDLE))
    for attribute, value in (("shape", "ring"), ("colour", "pink"), ("size", "large"), ("texture", "plain")):
        changed = difference(one, replace(one, things=(replace(corner, **{attribute: value}), MIDDLE)))
        assert changed[:CELL, :CELL].max() > 50, attribute
        changed[:CELL, :CELL] = 0
        assert changed.max() == 0, attribute


@pytest.mark.parametrize("background", BACKGROUNDS)
@pytest.mark.parametrize("size", SIZES)
def test_things_stay_in_their_cells(size: str, background: str) -> None:
    for index, shape in enumerate(SHAPES * 3):
        empty = Scene(f"7/{index}", background, ())
        thing = replace(MIDDLE, shape=shape, size=size, colour=COLOURS[index % len(COLOURS)])
        changed = difference(empty, replace(empty, things=(thing,))) > 0
        assert changed[CELL : 2 * CELL, CELL : 2 * CELL].sum() > 40
        changed[CELL : 2 * CELL, CELL : 2 * CELL] = False
        assert not changed.any()


def test_shapes_differ_from_each_other() -> None:
    scene = Scene("2/2", "dark", (MIDDLE,))
    for size in SIZES:
        for one, other in combinations(SHAPES, 2):
            two = [replace(scene, things=(replace(MIDDLE, shape=shape, size=size),)) for shape in (one, other)]
            assert (difference(*two) > 60).sum() >= 20, (one, other, size)


def test_large_covers_clearly_more_than_small() -> None:
    for index, shape in enumerate(SHAPES):
        empty = Scene(f"4/{index}", "light", ())
        small, large = (
            (difference(empty, replace(empty, things=(replace(MIDDLE, shape=shape, size=size),))) > 30).sum()
            for size in ("small", "large")
        )
        assert large > 1.8 * small, shape


@pytest.mark.parametrize("size", SIZES)
def test_textures_differ_from_each_other(size: str) -> None:
    for number, (shape, colour) in enumerate((shape, colour) for shape in SHAPES for colour in COLOURS):
        scene = Scene(f"5/{number}", BACKGROUNDS[number % 2], (MIDDLE,))
        kinds = {
            texture: replace(scene, things=(replace(MIDDLE, shape=shape, colour=colour, size=size, texture=texture),))
            for texture in TEXTURES
        }
        for one, other in combinations(TEXTURES, 2):
            assert (difference(kinds[one], kinds[other]) > 40).sum() >= 8, (shape, colour, one, other)


def test_colours_stay_apart_under_any_light() -> None:
    """The hue of a plain thing's middle names its colour: nearest palette entry, brightness ignored."""
    names = list(PALETTE)
    hues = np.array([PALETTE[name] for name in names], dtype=float)
    hues /= np.linalg.norm(hues, axis=1, keepdims=True)
    rng = random.Random(0)
    for index in range(300):
        colour = rng.choice(COLOURS)
        thing = replace(MIDDLE, row=rng.randrange(3), column=rng.randrange(3), colour=colour)
        picture = pixels(Scene(f"6/{index}", rng.choice(BACKGROUNDS), (thing,)))
        middle = picture[thing.row * CELL + CELL // 2, thing.column * CELL + CELL // 2]
        assert names[int((hues @ (middle / np.linalg.norm(middle))).argmax())] == colour


def test_backgrounds_are_light_and_dark() -> None:
    means = {name: [pixels(Scene(f"8/{index}", name, ())).mean() for index in range(40)] for name in BACKGROUNDS}
    assert max(means["dark"]) < 80
    assert min(means["light"]) > 160
