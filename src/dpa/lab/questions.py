"""Questions about a scene, with answers that cannot be guessed from the question.

Every kind of question enumerates the *facts* of a scene it may ask about: a form (which shares its phrasings and its
possible answers), the words to put in, and the answer. A question is drawn answer first, fact second, phrasing last, so
that within a scene every possible answer is equally likely; :func:`balanced_questions` makes the answers of each form
equally frequent over a whole set of scenes.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from dpa.lab.language import COUNTS
from dpa.lab.scenes import COLOURS, COLUMNS, GRID, MAX_OBJECTS, ROWS, SHAPES, SIZES, TEXTURES, Scene, Thing

PLACES: Final = tuple(f"{row} {column}" for row in ROWS for column in COLUMNS)
YES_NO: Final = ("yes", "no")

_PHRASINGS: Final = MappingProxyType(
    {
        "colour": ("what colour is {x}?", "which colour is {x}?", "what is the colour of {x}?"),
        "shape": ("what shape is {x}?", "which shape is {x}?", "what is the shape of {x}?"),
        "size": ("what size is {x}?", "which size is {x}?", "what is the size of {x}?"),
        "texture": ("what texture is {x}?", "which texture is {x}?", "what is the texture of {x}?"),
        "position": ("where is {x}?", "at which place is {x}?", "what is the place of {x}?"),
        "count/all": ("how many things are there?", "how many things do you see?", "what is the number of things?"),
        "count/some": ("what is the number of {x}?", "can you count the {x}?", "there are how many {x}?"),
        "existence/thing": ("is there a {x}?", "do you see a {x}?", "does the image show a {x}?"),
        "existence/place": (
            "is there a thing {x}?",
            "do you see a thing {x}?",
        ),
        "comparison/larger": ("is {x} larger than {y}?", "is {x} the larger one beside {y}?"),
        "comparison/smaller": ("is {x} smaller than {y}?", "is {x} the smaller one beside {y}?"),
        "relation/left": ("is {x} left of {y}?", "is {x} to the left of {y}?"),
        "relation/right": ("is {x} right of {y}?", "is {x} to the right of {y}?"),
        "relation/above": ("is {x} above {y}?", "is {x} higher up than {y}?"),
        "relation/below": ("is {x} below {y}?", "is {x} further down than {y}?"),
    }
)
"""Form -> its phrasings. What stands before the slash is the kind. What is asked about stands last wherever it can."""

_MOST_SOME: Final = 2
"""Largest answer of ``how many circles``: higher counts are too rare to balance."""

CHOICES: Final = MappingProxyType(
    {
        "colour": COLOURS,
        "shape": SHAPES,
        "size": SIZES,
        "texture": TEXTURES,
        "position": PLACES,
        "count/all": COUNTS[1 : MAX_OBJECTS + 1],
        "count/some": COUNTS[: _MOST_SOME + 1],
        **{form: YES_NO for form in _PHRASINGS if form.split("/")[0] in ("existence", "comparison", "relation")},
    }
)
"""Form -> all answers it may have."""


@dataclass(frozen=True, slots=True)
class Question:
    """A question in plain words. ``answer`` is one of ``choices``, the possible answers of ``form``.

    ``form`` is the kind, or the kind and a variant (``count/all``). Where answers are balanced per form, an answer that
    is guessed from the question is right in ``1 / len(choices)`` of the cases.
    """

    kind: str
    form: str
    text: str
    answer: str
    choices: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Fact:
    """Something to ask: the words for the slots of a form's phrasings, and the answer."""

    form: str
    answer: str
    x: str = ""
    y: str = ""


def _names(scene: Scene, thing: Thing, hidden: str = "") -> list[str]:
    """Phrases that name ``thing`` alone in its scene and do not say its attribute ``hidden``."""
    names = []
    if hidden != "shape" and sum(other.shape == thing.shape for other in scene.things) == 1:
        names.append(f"the {thing.shape}")
    if hidden != "colour" and sum(other.colour == thing.colour for other in scene.things) == 1:
        names.append(f"the {thing.colour} thing")
    if hidden not in ("shape", "colour") and not names:
        pair = (thing.colour, thing.shape)
        if sum((other.colour, other.shape) == pair for other in scene.things) == 1:
            names.append(f"the {thing.colour} {thing.shape}")
    if hidden in ("shape", "colour"):
        names.append(f"the thing {thing.place}")
    return names


def _attribute_facts(attribute: str) -> Callable[[Scene], Iterator[_Fact]]:
    def facts(scene: Scene) -> Iterator[_Fact]:
        for thing in scene.things:
            values = {"colour": thing.colour, "shape": thing.shape, "size": thing.size, "texture": thing.texture}
            for name in _names(scene, thing, attribute):
                yield _Fact(attribute, values[attribute], name)

    return facts


def _position_facts(scene: Scene) -> Iterator[_Fact]:
    for thing in scene.things:
        for name in _names(scene, thing):
            yield _Fact("position", thing.place, name)


def _count_facts(scene: Scene) -> Iterator[_Fact]:
    yield _Fact("count/all", COUNTS[len(scene.things)])
    shapes = Counter(thing.shape for thing in scene.things)
    colours = Counter(thing.colour for thing in scene.things)
    sought = [(f"{shape}{'es' if shape == 'cross' else 's'}", shapes[shape]) for shape in SHAPES]
    sought += [(f"{colour} things", colours[colour]) for colour in COLOURS]
    for name, number in sought:
        if number <= _MOST_SOME:
            yield _Fact("count/some", COUNTS[number], name)


def _yes_no(holds: bool) -> str:
    return "yes" if holds else "no"


def _existence_facts(scene: Scene) -> Iterator[_Fact]:
    shapes = {thing.shape for thing in scene.things}
    colours = {thing.colour for thing in scene.things}
    pairs = {(thing.colour, thing.shape) for thing in scene.things}
    places = {thing.place for thing in scene.things}
    for shape in SHAPES:
        yield _Fact("existence/thing", _yes_no(shape in shapes), shape)
    for colour in COLOURS:
        yield _Fact("existence/thing", _yes_no(colour in colours), f"{colour} thing")
    for colour in COLOURS:
        for shape in SHAPES:
            # A missing pair is asked for only where one half of it is there: looking at one word is not enough.
            if (colour, shape) in pairs or (colour in colours) != (shape in shapes):
                yield _Fact("existence/thing", _yes_no((colour, shape) in pairs), f"{colour} {shape}")
    for place in PLACES:
        yield _Fact("existence/place", _yes_no(place in places), place)


def _pairs(scene: Scene) -> Iterator[tuple[Thing, Thing]]:
    for one in scene.things:
        for other in scene.things:
            if one is not other:
                yield one, other


def _comparison_facts(scene: Scene) -> Iterator[_Fact]:
    """Only pairs of different size, so that the opposite question has the opposite answer."""
    for one, other in _pairs(scene):
        if one.size == other.size:
            continue
        for x in _names(scene, one):
            for y in _names(scene, other):
                yield _Fact("comparison/larger", _yes_no(one.size == "large"), x, y)
                yield _Fact("comparison/smaller", _yes_no(one.size == "small"), x, y)


def _relation_facts(scene: Scene) -> Iterator[_Fact]:
    """Only pairs at opposite ends of the asked axis: they differ at a glance, in the picture as in the description."""
    for one, other in _pairs(scene):
        for x in _names(scene, one):
            for y in _names(scene, other):
                if abs(one.column - other.column) == GRID - 1:
                    yield _Fact("relation/left", _yes_no(one.column < other.column), x, y)
                    yield _Fact("relation/right", _yes_no(one.column > other.column), x, y)
                if abs(one.row - other.row) == GRID - 1:
                    yield _Fact("relation/above", _yes_no(one.row < other.row), x, y)
                    yield _Fact("relation/below", _yes_no(one.row > other.row), x, y)


_FACTS: Final = MappingProxyType(
    {
        "colour": _attribute_facts("colour"),
        "shape": _attribute_facts("shape"),
        "size": _attribute_facts("size"),
        "texture": _attribute_facts("texture"),
        "position": _position_facts,
        "count": _count_facts,
        "existence": _existence_facts,
        "comparison": _comparison_facts,
        "relation": _relation_facts,
    }
)

KINDS: Final = tuple(_FACTS)
"""All kinds of questions."""


def _phrase(fact: _Fact, rng: random.Random) -> Question:
    template = rng.choice(_PHRASINGS[fact.form])
    return Question(
        kind=fact.form.split("/")[0],
        form=fact.form,
        text=template.format(x=fact.x, y=fact.y),
        answer=fact.answer,
        choices=CHOICES[fact.form],
    )


def _facts_by_form(scene: Scene, kind: str) -> dict[str, dict[str, list[_Fact]]]:
    """Form -> answer -> facts of ``scene`` with that answer, in a fixed order."""
    grouped: dict[str, dict[str, list[_Fact]]] = defaultdict(lambda: defaultdict(list))
    for fact in _FACTS[kind](scene):
        grouped[fact.form][fact.answer].append(fact)
    return grouped


def ask(scene: Scene, kind: str, rng: random.Random) -> Question | None:
    """A question of ``kind`` about ``scene``, or ``None`` where the scene has nothing such to ask.

    Form, answer (uniform among those possible here), fact and phrasing are drawn from ``rng`` in this order.

    Raises:
        KeyError: if ``kind`` is not in :data:`KINDS`.
    """
    grouped = _facts_by_form(scene, kind)
    if not grouped:
        return None
    by_answer = grouped[rng.choice(list(grouped))]
    return _phrase(rng.choice(by_answer[rng.choice(list(by_answer))]), rng)


def balanced_questions(
    scenes: Iterable[Scene], per_scene: int, seed: int, *, kinds: Sequence[str] = KINDS, slack: int = 2
) -> list[tuple[Scene, Question]]:
    """Up to ``per_scene`` questions for each scene, kinds equally often, answers of each form equally often.

    A question whose answer is already ``slack`` ahead of the rarest answer of its form is not asked; so a scene may get
    fewer than ``per_scene`` questions, and the counts of two answers of one form never differ by more than ``slack``.
    No question text is asked twice about the same scene.
    """
    rng = random.Random(f"questions:{seed}")
    answers: dict[str, Counter[str]] = {form: Counter() for form in CHOICES}
    per_kind: Counter[str] = Counter()
    result: list[tuple[Scene, Question]] = []
    for scene in scenes:
        asked: set[str] = set()
        left = list(kinds)
        while len(asked) < per_scene and left:
            # The rarest kind so far goes first; ties fall at random.
            kind = min(left, key=lambda name: (per_kind[name], rng.random()))
            left.remove(kind)
            question = _least_asked(scene, kind, answers, slack, rng)
            if question is None or question.text in asked:
                continue
            asked.add(question.text)
            per_kind[kind] += 1
            answers[question.form][question.answer] += 1
            result.append((scene, question))
            if not left and len(kinds) < per_scene:
                left = list(kinds)
    return result


def _least_asked(
    scene: Scene, kind: str, answers: dict[str, Counter[str]], slack: int, rng: random.Random
) -> Question | None:
    """The question of ``kind`` that helps the balance most: rarest form first, then its rarest answer."""
    grouped = _facts_by_form(scene, kind)
    forms = sorted(grouped, key=lambda form: (answers[form].total() / len(CHOICES[form]), rng.random()))
    for form in forms:
        counts = answers[form]
        floor = min(counts[choice] for choice in CHOICES[form])
        answer = min(grouped[form], key=lambda choice: (counts[choice], rng.random()))
        if counts[answer] < floor + slack:
            return _phrase(rng.choice(grouped[form][answer]), rng)
    return None
