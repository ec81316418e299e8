"""The two languages of the lab: one scene, two ways to say it.

Both languages are grammars of templates. A template is literal text (linguistic: how something is said) with slots
(visual: what is said about this very scene). The writer knows for every word which of the two it wrote, so a caption
carries its own ground truth for visual relevance.

* **Language A** is plain: the base LLM's own prior. About ten words per object.
* **Language B** is another register: other words for every attribute, other word order, openings, exclamations and
  flourishes, about three times as long. No attribute word of A occurs in it.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal

from dpa.lab.scenes import Scene, Thing

Language = Literal["a", "b"]
LANGUAGES: Final = ("a", "b")

COUNTS: Final = ("zero", "one", "two", "three", "four", "five")

SYNONYMS: Final = MappingProxyType(
    {
        "circle": ("orb", "disc"),
        "square": ("box", "block"),
        "triangle": ("wedge", "pyramid"),
        "star": ("starlet", "asterisk"),
        "cross": ("plus", "saltire"),
        "ring": ("hoop", "loop"),
        "red": ("crimson", "scarlet"),
        "orange": ("tangerine", "amber"),
        "yellow": ("golden", "lemon"),
        "green": ("emerald", "jade"),
        "blue": ("azure", "cobalt"),
        "purple": ("violet", "plum"),
        "pink": ("rosy", "fuchsia"),
        "small": ("petite", "tiny"),
        "large": ("huge", "mighty"),
        "plain": ("solid", "bare"),
        "striped": ("banded", "lined"),
        "dotted": ("speckled", "spotted"),
        "light": ("pale", "bright"),
        "dark": ("dim", "shadowy"),
        "one": ("solo",),
        "two": ("pair",),
        "three": ("trio",),
        "four": ("quartet",),
        "five": ("quintet",),
        "top left": ("northwest",),
        "top centre": ("north",),
        "top right": ("northeast",),
        "middle left": ("west",),
        "middle centre": ("heart",),
        "middle right": ("east",),
        "bottom left": ("southwest",),
        "bottom centre": ("south",),
        "bottom right": ("southeast",),
    }
)
"""A's word for an attribute, a count, a background or a place -> B's words for it."""

# Language A. Slots: {np} size, texture, colour, shape; {place}; {count}; {bg}. "things" is written "thing" after one.
# The place stands right behind the shape in every form: what belongs together stands together, and a small model can
# look it up from either end.
_A_SENTENCES: Final = (
    "there is a {np} {place}.",
    "a {np} {place}.",
    "here is a {np} {place}.",
    "you can see a {np} {place}.",
    "we see a {np} {place}.",
    "it has a {np} {place}.",
    "it shows a {np} {place}.",
)
_A_ITEM: Final = "a {np} {place}"
_A_OPENINGS: Final = (
    "",
    "the background is {bg}.",
    "a {bg} background.",
    "there {are} {count} {things}.",
    "the image shows {count} {things}.",
    "{count} {things} on a {bg} background.",
    "there {are} {count} {things} on a {bg} background.",
    "the image shows {count} {things} on a {bg} background.",
    "a {bg} image with {count} {things}.",
)
_A_LISTS: Final = (
    "there {are} {items}.",
    "the image shows {items}.",
    "on a {bg} background there {are} {items}.",
    "a {bg} image with {items}.",
    "{count} {things}: {items}.",
    "there {are} {count} {things} on a {bg} background: {items}.",
)
_A_LIST_SHARE: Final = 0.35

# Language B. Slots: {shape}, {colour}, {size}, {texture}, {place}, {count}, {bg}, {an} (article of the next word) and
# {flourish}, which is linguistic.
_B_OPENINGS: Final = (
    "oh, what a sight awaits us, {flourish}: a {count} of forms upon a canvas so {bg}!",
    "hark, {flourish}! upon a {bg} canvas our gaze discovers a {count} of figures!",
    "gather round, {flourish}, and marvel, for a {bg} stage bears a {count} of wonders!",
    "good heavens, how {bg} a backdrop, and what a {count} of curiosities upon it!",
    "pray, permit me to recount, {flourish}, a {count} of marvels under skies so {bg}!",
    "well now, {flourish}, never did canvas so {bg} carry such a {count} of delights!",
)
_B_SENTENCES: Final = (
    "behold, in the {place}, {flourish}, {an} {shape} of most {colour} hue, {texture} all over and {size} in stature!",
    "lo, {size} and {texture}, there dwells in yonder {place} {an} {shape} wearing naught but {colour}, {flourish}!",
    "cast your eyes to the {place}, where {an} {shape} rests, {colour} as a dream, {texture} in garb, {size} of frame!",
    "what joy, {flourish}, for {an} {shape}, how {colour}, how {texture}, how utterly {size}, adorns the {place}!",
    "should you wander to the {place}, you would meet {an} {shape}, {texture}, {colour} and, {flourish}, {size}!",
    "ah, how {colour} glows that {shape}, {size} by nature and {texture} by choice, which guards the {place} for us!",
    "and who reigns over the {place}, {flourish}? why, {an} {shape}, {size} in its pride, clad in {texture} {colour}!",
    "so {texture}, so {colour}, so gloriously {size}, {flourish}: thus rests {an} {shape} within the {place}!",
)
_B_FLOURISHES: Final = (
    "dear friend",
    "upon my word",
    "if you please",
    "i do declare",
    "gentle reader",
    "mark it well",
    "believe me",
    "sweet muse",
)
_B_CLOSINGS: Final = (
    "",
    "such splendour, {flourish}!",
    "who could ever forget it, {flourish}?",
    "thus ends our tale!",
    "and there my heartfelt song must rest!",
)

_SLOT: Final = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True, slots=True)
class Caption:
    """A caption and the character spans ``(start, end)`` of its visual words, in order, one span per word."""

    text: str
    visual_spans: tuple[tuple[int, int], ...]

    @property
    def visual_share(self) -> float:
        """The share of visual words among all words (punctuation belongs to its word)."""
        return len(self.visual_spans) / len(self.text.split())


class _Writer:
    """Collects text and remembers which words are visual."""

    def __init__(self) -> None:
        self.text = ""
        self.spans: list[tuple[int, int]] = []

    def literal(self, text: str) -> None:
        self.text += text

    def visual(self, words: str) -> None:
        for index, word in enumerate(words.split(" ")):
            if index:
                self.text += " "
            self.spans.append((len(self.text), len(self.text) + len(word)))
            self.text += word

    def fill(self, template: str, visual: dict[str, str], linguistic: dict[str, str]) -> None:
        """Write ``template``; slots come from ``visual`` or ``linguistic``; ``{an}`` fits the slot that follows it."""
        position = 0
        for match in _SLOT.finditer(template):
            self.literal(template[position : match.start()])
            name = match.group(1)
            position = match.end()
            if name == "an":
                following = _SLOT.search(template, position)
                assert following is not None, f"no slot after {{an}} in {template!r}"
                self.literal("an" if visual[following.group(1)][0] in "aeiou" else "a")
            elif name in visual:
                self.visual(visual[name])
            else:
                self.literal(linguistic[name])
        self.literal(template[position:])

    def caption(self) -> Caption:
        return Caption(self.text, tuple(self.spans))


def caption(scene: Scene, language: Language, rng: random.Random, *, synonyms: bool = False) -> Caption:
    """Say ``scene`` in ``language`` (``"a"`` or ``"b"``): every object with all its attributes, in a random order.

    The form depends on ``rng`` alone, so the same scene, language and generator state give the same caption.
    ``synonyms`` puts B's words into A's grammar (it changes nothing in B): the LLM's pretraining meets B's vocabulary
    this way.

    Raises:
        ValueError: if ``language`` is neither ``"a"`` nor ``"b"``.
    """
    if language == "a":
        return _say_a(scene, rng, synonyms)
    if language == "b":
        return _say_b(scene, rng)
    raise ValueError(f"language is {language!r}; it must be one of {LANGUAGES}")


def _shuffled(scene: Scene, rng: random.Random) -> list[Thing]:
    return rng.sample(scene.things, len(scene.things))


def _b_word(word: str, rng: random.Random) -> str:
    return rng.choice(SYNONYMS[word])


def _say_a(scene: Scene, rng: random.Random, synonyms: bool) -> Caption:
    def word(a_word: str) -> str:
        return _b_word(a_word, rng) if synonyms else a_word

    def slots(thing: Thing) -> dict[str, str]:
        phrase = f"{word(thing.size)} {word(thing.texture)} {word(thing.colour)} {word(thing.shape)}"
        return {"np": phrase, "place": word(thing.place)}

    writer = _Writer()
    number = len(scene.things)
    # Counts keep A's word: B's (pair, trio) are nouns and do not fit A's grammar.
    opening = {"count": COUNTS[number], "bg": word(scene.background)}
    grammar = {"are": "is" if number == 1 else "are", "things": "thing" if number == 1 else "things"}
    things = _shuffled(scene, rng)
    if rng.random() < _A_LIST_SHARE:
        head, tail = rng.choice(_A_LISTS).split("{items}")
        # The verb before a list agrees with the list's first item.
        writer.fill(head, opening, grammar if "{count}" in head else grammar | {"are": "is"})
        for index, thing in enumerate(things):
            if index:
                writer.literal(" and " if index == number - 1 else ", ")
            writer.fill(_A_ITEM, slots(thing), {})
        writer.literal(tail)
        return writer.caption()
    writer.fill(rng.choice(_A_OPENINGS), opening, grammar)
    for thing in things:
        writer.literal(" " if writer.text else "")
        writer.fill(rng.choice(_A_SENTENCES), slots(thing), {})
    return writer.caption()


def _say_b(scene: Scene, rng: random.Random) -> Caption:
    writer = _Writer()

    def fill(template: str, visual: dict[str, str]) -> None:
        writer.literal(" " if writer.text and template else "")
        writer.fill(template, visual, {"flourish": rng.choice(_B_FLOURISHES)})

    number = COUNTS[len(scene.things)]
    fill(rng.choice(_B_OPENINGS), {"count": _b_word(number, rng), "bg": _b_word(scene.background, rng)})
    for thing in _shuffled(scene, rng):
        visual = {
            "shape": _b_word(thing.shape, rng),
            "colour": _b_word(thing.colour, rng),
            "size": _b_word(thing.size, rng),
            "texture": _b_word(thing.texture, rng),
            "place": _b_word(thing.place, rng),
        }
        fill(rng.choice(_B_SENTENCES), visual)
    fill(rng.choice(_B_CLOSINGS), {})
    return writer.caption()
