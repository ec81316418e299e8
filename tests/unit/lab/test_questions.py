"""Questions: right, balanced, varied. Answers are checked from the words of the question, not by the generator."""

import random
import re
from collections import Counter, defaultdict

import pytest

from dpa.lab.questions import CHOICES, KINDS, Question, ask, balanced_questions
from dpa.lab.scenes import COLOURS, COLUMNS, ROWS, SHAPES, Scene, Thing, draw_scene

SCENES = [draw_scene(21, index) for index in range(600)]
NUMBERS = ("zero", "one", "two", "three", "four", "five")


def match(scene: Scene, words: str) -> list[Thing]:
    """All things that ``words`` ("red circle", "thing top left", "circles", "blue things") may mean."""
    left = set(re.findall(r"[a-z]+", words)) - {"the", "thing", "things", "at", "a"}
    left = {{"crosses": "cross"}.get(word, word[:-1] if word[:-1] in SHAPES else word) for word in left}
    assert left <= {*SHAPES, *COLOURS, *ROWS, *COLUMNS}, words

    def fits(thing: Thing) -> bool:
        return left <= {thing.shape, thing.colour, ROWS[thing.row], COLUMNS[thing.column]}

    return [thing for thing in scene.things if fits(thing)]


def only(scene: Scene, words: str) -> Thing:
    found = match(scene, words)
    assert len(found) == 1, f"{words!r} means {len(found)} things"
    return found[0]


def brute_force(scene: Scene, text: str) -> str:
    """The answer to ``text``, from its words alone."""

    def yes(holds: bool) -> str:
        return "yes" if holds else "no"

    attribute = re.fullmatch(r"(?:what|which|what is the) (colour|shape|size|texture) (?:is|of) (the .+)\?", text)
    if attribute:
        return str(getattr(only(scene, attribute[2]), attribute[1]))
    where = re.fullmatch(r"(?:where is|at which place is|what is the place of) (the .+)\?", text)
    if where:
        return only(scene, where[1]).place
    number = re.fullmatch(
        r"(?:how many|what is the number of|can you count the|there are how many) (.+?)(?: are there| do you see)?\?",
        text,
    )
    if number:
        return NUMBERS[len(match(scene, number[1]))]
    exists = re.fullmatch(r"(?:is there|do you see|does the image show) a (.+)\?", text)
    if exists:
        return yes(bool(match(scene, exists[1])))
    two = re.fullmatch(
        r"is (the .+?) (?:to )?(?:the )?(larger|smaller|left|right|above|below|higher|further)"
        r"(?: one beside| than| of| up than| down than)? (the .+)\?",
        text,
    )
    assert two, f"nobody understands {text!r}"
    one, other = only(scene, two[1]), only(scene, two[3])
    return yes(
        {
            "larger": (one.size, other.size) == ("large", "small"),
            "smaller": (one.size, other.size) == ("small", "large"),
            "left": one.column < other.column,
            "right": one.column > other.column,
            "above": one.row < other.row,
            "below": one.row > other.row,
            "higher": one.row < other.row,
            "further": one.row > other.row,
        }[two[2]]
    )


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_right(kind: str) -> None:
    rng = random.Random(kind)
    asked = 0
    for scene in SCENES:
        question = ask(scene, kind, rng)
        if question is not None:
            asked += 1
            assert question.kind == kind
            assert question.answer in question.choices
            assert question.choices == CHOICES[question.form]
            assert brute_force(scene, question.text) == question.answer, (scene, question)
    assert asked > len(SCENES) / 2


def test_deterministic() -> None:
    def draw() -> list[Question | None]:
        return [ask(scene, kind, random.Random(1)) for scene in SCENES[:50] for kind in KINDS]

    assert draw() == draw()
    assert balanced_questions(SCENES, 3, 7) == balanced_questions(SCENES, 3, 7)
    assert balanced_questions(SCENES, 3, 7) != balanced_questions(SCENES, 3, 8)


def test_nothing_to_ask_is_none() -> None:
    lonely = draw_scene(22, 0, minimum=1, maximum=1)
    assert ask(lonely, "relation", random.Random(0)) is None
    assert ask(lonely, "comparison", random.Random(0)) is None
    with pytest.raises(KeyError):
        ask(lonely, "smell", random.Random(0))


def test_balanced_questions_are_right_and_balanced() -> None:
    asked = balanced_questions(SCENES, 4, 0)
    assert len(asked) > 0.9 * 4 * len(SCENES)
    by_form: dict[str, Counter[str]] = defaultdict(Counter)
    kinds: Counter[str] = Counter()
    for scene, question in asked:
        assert brute_force(scene, question.text) == question.answer
        by_form[question.form][question.answer] += 1
        kinds[question.kind] += 1
    assert set(by_form) == set(CHOICES)
    for form, counts in by_form.items():
        assert set(counts) == set(CHOICES[form])
        assert max(counts.values()) - min(counts.values()) <= 2, (form, counts)
    assert set(kinds) == set(KINDS)
    assert max(kinds.values()) < 1.2 * min(kinds.values())
    per_scene = Counter(scene.key for scene, _ in asked)
    assert max(per_scene.values()) <= 4
    assert len({(scene.key, question.text) for scene, question in asked}) == len(asked)


def test_the_question_does_not_give_the_answer_away() -> None:
    """Learn the commonest answer of each question text on one half, guess on the other: barely above chance."""
    asked = [question for _, question in balanced_questions([draw_scene(23, i) for i in range(4000)], 6, 0)]
    random.Random(0).shuffle(asked)
    half = len(asked) // 2
    seen: dict[str, Counter[str]] = defaultdict(Counter)
    for question in asked[:half]:
        seen[question.text][question.answer] += 1
    hits, chance = Counter[str](), defaultdict[str, list[float]](list)
    for question in asked[half:]:
        guess = seen[question.text].most_common(1)[0][0] if seen[question.text] else question.choices[0]
        hits[question.kind] += guess == question.answer
        chance[question.kind].append(1 / len(question.choices))
    for kind in KINDS:
        number = len(chance[kind])
        assert hits[kind] / number < sum(chance[kind]) / number + 0.1, kind


def test_subset_of_kinds_and_more_questions_than_kinds() -> None:
    asked = balanced_questions(SCENES[:200], 3, 0, kinds=("colour",))
    assert {question.kind for _, question in asked} == {"colour"}
    assert max(Counter(scene.key for scene, _ in asked).values()) == 3


def test_several_phrasings_and_many_texts() -> None:
    rng = random.Random(5)
    texts: dict[str, set[str]] = defaultdict(set)
    for scene in SCENES:
        for kind in KINDS:
            question = ask(scene, kind, rng)
            if question is not None:
                texts[kind].add(question.text)
                assert re.fullmatch(r"[a-z ]+\?", question.text)
                assert re.fullmatch(r"[a-z]+( [a-z]+)?", question.answer)
    assert sum(len(values) for values in texts.values()) > 1000
    for kind in KINDS:
        assert (
            len({re.sub(rf"\b({'|'.join((*SHAPES, *COLOURS, *ROWS, *COLUMNS))})\b", "_", t) for t in texts[kind]}) > 3
        )
