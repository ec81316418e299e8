"""The miniature world: what a scene is, and how one is drawn at random.

A scene is a 3 x 3 grid with one to five objects in different cells. Everything that a caption may say or a question may
ask is a field here; everything that only the picture shows (jitter, rotation, lighting) follows from ``Scene.key``, so
that one key means one picture, for ever.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink")
SIZES = ("small", "large")
TEXTURES = ("plain", "striped", "dotted")
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "centre", "right")
BACKGROUNDS = ("light", "dark")
GRID = 3
MAX_OBJECTS = 5


@dataclass(frozen=True, slots=True, order=True)
class Thing:
    """One object. ``row`` and ``column`` count from the top left, 0 to 2."""

    row: int
    column: int
    shape: str
    colour: str
    size: str
    texture: str

    @property
    def place(self) -> str:
        """The cell's name in the world's own words, e.g. ``top left`` or ``middle centre``."""
        return f"{ROWS[self.row]} {COLUMNS[self.column]}"


@dataclass(frozen=True, slots=True)
class Scene:
    """A scene. ``key`` (``"<seed>/<index>"``) names it and seeds all that is only seen; ``things`` in reading order."""

    key: str
    background: str
    things: tuple[Thing, ...]


def draw_scene(seed: int, index: int, *, minimum: int = 1, maximum: int = MAX_OBJECTS) -> Scene:
    """Scene number ``index`` of the world ``seed``: the same arguments give the same scene on every machine.

    The number of objects is uniform in ``minimum..maximum``; attributes are independent and uniform, so no attribute
    predicts another and nothing but looking tells what is there.
    """
    key = f"{seed}/{index}"
    rng = random.Random(f"scene:{key}:{minimum}:{maximum}")
    count = rng.randint(minimum, maximum)
    cells = sorted(rng.sample(range(GRID * GRID), count))
    things = tuple(
        Thing(
            row=cell // GRID,
            column=cell % GRID,
            shape=rng.choice(SHAPES),
            colour=rng.choice(COLOURS),
            size=rng.choice(SIZES),
            texture=rng.choice(TEXTURES),
        )
        for cell in cells
    )
    return Scene(key=key, background=rng.choice(BACKGROUNDS), things=things)
