"""From a scene to its picture: 96 x 96 pixels, 32 per cell, so that patches of 16 fall 2 x 2 into every cell.

Everything is drawn four times as large and averaged down, which smooths the edges. What a caption cannot say (place
inside the cell, rotation, exact size, tint, lighting) is drawn from a generator seeded by ``Scene.key`` alone.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from functools import cache
from types import MappingProxyType
from typing import Final

import numpy as np
from PIL import Image, ImageChops, ImageDraw

from dpa.lab.scenes import GRID, Scene, Thing

IMAGE_SIDE: Final = 96
"""Width and height of a picture in pixels."""
_SCALE: Final = 4
_CELL: Final = IMAGE_SIDE // GRID * _SCALE

Colour = tuple[int, int, int]
Point = tuple[float, float]

PALETTE: Final = MappingProxyType(
    {
        "red": (216, 34, 34),
        "orange": (246, 134, 18),
        "yellow": (247, 222, 40),
        "green": (34, 158, 62),
        "blue": (38, 88, 224),
        "purple": (126, 48, 170),
        "pink": (250, 140, 192),
    }
)
"""sRGB before lighting. Hues stay apart under the whole range of brightness."""

_BASE: Final = MappingProxyType({"light": 226, "dark": 44})
_RADIUS: Final = MappingProxyType({"small": 8.0, "large": 13.2})
"""Radius of the circle around a shape, in pixels of the picture."""
_JITTER: Final = MappingProxyType({"small": 4.5, "large": 1.4})
"""Largest shift of a shape from the middle of its cell: it never leaves the cell."""
_TURN: Final = 12.0
"""Largest rotation in degrees."""
_BRIGHTNESS: Final = 0.15
_RIM: Final = 4
"""Width of the edge that stripes and dots leave free, in large pixels: ink like the background frays no outline."""
_HOLE: Final = 0.44
"""Radius of a ring's hole, in radii of the ring."""
_GRADIENT: Final = 0.10
"""Largest change of brightness from the middle of the picture to its edge."""

_DARK_INK: Final = (20, 20, 28)
_LIGHT_INK: Final = (255, 255, 255)
_DARK_INKED: Final = ("orange", "yellow", "pink")
"""Colours whose stripes and dots are dark; on the others they are white."""


def _regular(count: int, radius: float, first: float) -> list[Point]:
    """Corners of a regular polygon, the first at ``first`` degrees (0 is right, 90 is down)."""
    angles = (math.radians(first + 360 * index / count) for index in range(count))
    return [(radius * math.cos(angle), radius * math.sin(angle)) for angle in angles]


def _square(radius: float) -> list[Point]:
    return _regular(4, radius * 1.12, 45)


def _triangle(radius: float) -> list[Point]:
    # Lowered, so that its box and not its centre of mass sits in the middle.
    return [(x, y + radius * 0.18) for x, y in _regular(3, radius * 1.15, -90)]


def _star(radius: float) -> list[Point]:
    outer, inner = _regular(5, radius * 1.06, -90), _regular(5, radius * 0.54, -54)
    return [point for pair in zip(outer, inner, strict=True) for point in pair]


def _cross(radius: float) -> list[Point]:
    long, short = radius, radius * 0.38
    quarter = [(short, -short), (short, -long), (-short, -long)]
    turns: tuple[Callable[[Point], Point], ...] = (
        lambda p: p,
        lambda p: (p[1], -p[0]),
        lambda p: (-p[0], -p[1]),
        lambda p: (-p[1], p[0]),
    )
    return [turn(point) for turn in turns for point in quarter]


_POLYGONS: Final = MappingProxyType({"square": _square, "triangle": _triangle, "star": _star, "cross": _cross})


def _disc(draw: ImageDraw.ImageDraw, centre: Point, radius: float, fill: int) -> None:
    x, y = centre
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)


def _masks(shape: str, radius: float, centre: Point, turn: float) -> tuple[Image.Image, Image.Image]:
    """Cell-sized masks of the shape and of its inside, which a rim surrounds. Large pixels; ``turn`` in degrees."""
    mask = Image.new("L", (_CELL, _CELL), 0)
    draw = ImageDraw.Draw(mask)
    if shape in _POLYGONS:
        cosine, sine = math.cos(math.radians(turn)), math.sin(math.radians(turn))
        corners = [
            (centre[0] + x * cosine - y * sine, centre[1] + x * sine + y * cosine) for x, y in _POLYGONS[shape](radius)
        ]
        draw.polygon(corners, fill=255)
        inside = mask.copy()
        ImageDraw.Draw(inside).line([*corners, *corners[:2]], fill=0, width=2 * _RIM, joint="curve")
        return mask, inside
    inside = mask.copy()
    draw_inside = ImageDraw.Draw(inside)
    _disc(draw, centre, radius, 255)
    _disc(draw_inside, centre, radius - _RIM, 255)
    if shape == "ring":
        _disc(draw, centre, radius * _HOLE, 0)
        _disc(draw_inside, centre, radius * _HOLE + _RIM, 0)
    return mask, inside


@cache
def _ink(texture: str) -> Image.Image:
    """The mask of a texture, larger than a cell in both directions by a period and more."""
    side = _CELL * 2
    mask = Image.new("L", (side, side), 0)
    draw = ImageDraw.Draw(mask)
    if texture == "striped":
        period, width = 22, 7
        for start in range(-side, side, period):
            draw.line((start, 0, start + side, side), fill=255, width=width)
    elif texture == "dotted":
        period = 18
        for row in range(side // period + 1):
            for column in range(side // period + 1):
                _disc(draw, ((column + row % 2 / 2) * period, row * period), 4.9, 255)
    return mask


def _paint(canvas: Image.Image, thing: Thing, rng: random.Random) -> None:
    """Draws ``thing`` into its cell. Takes the same number of draws from ``rng`` whatever the thing is."""
    radius = _RADIUS[thing.size] * rng.uniform(0.95, 1.05) * _SCALE
    reach = _JITTER[thing.size] * _SCALE
    centre = (_CELL / 2 + rng.uniform(-reach, reach), _CELL / 2 + rng.uniform(-reach, reach))
    turn = rng.uniform(-_TURN, _TURN)
    phase = (rng.randrange(_CELL // 2), rng.randrange(_CELL // 2))
    corner = (thing.column * _CELL, thing.row * _CELL)
    mask, inside = _masks(thing.shape, radius, centre, turn)
    canvas.paste(PALETTE[thing.colour], corner, mask)
    if thing.texture == "plain":
        return
    ink = _ink(thing.texture).crop((phase[0], phase[1], phase[0] + _CELL, phase[1] + _CELL))
    colour = _DARK_INK if thing.colour in _DARK_INKED else _LIGHT_INK
    canvas.paste(colour, corner, ImageChops.multiply(inside, ink))


def _light(side: int, rng: random.Random) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """Brightness per pixel, ``[side, side, 1]``: one level and a soft slope across the picture."""
    level = rng.uniform(1 - _BRIGHTNESS, 1 + _BRIGHTNESS)
    angle = rng.uniform(0, 2 * math.pi)
    slope = rng.uniform(0, _GRADIENT)
    axis = np.linspace(-1, 1, side, dtype=np.float32)
    plane = math.cos(angle) * axis[None, :] + math.sin(angle) * axis[:, None]
    return np.asarray(level * (1 + slope * plane), dtype=np.float32)[:, :, None]


def render(scene: Scene) -> Image.Image:
    """The picture of ``scene``: RGB, :data:`IMAGE_SIDE` pixels square. The same scene gives the same pixels."""
    rng = random.Random(f"render:{scene.key}")
    base = _BASE[scene.background]
    tint: Colour = (base + rng.randint(-14, 14), base + rng.randint(-14, 14), base + rng.randint(-14, 14))
    canvas = Image.new("RGB", (IMAGE_SIDE * _SCALE, IMAGE_SIDE * _SCALE), tint)
    light = _light(IMAGE_SIDE, rng)
    for thing in scene.things:
        _paint(canvas, thing, rng)
    pixels = np.asarray(canvas.reduce(_SCALE), dtype=np.float32) * light
    return Image.fromarray(np.clip(pixels + 0.5, 0, 255).astype(np.uint8))
