"""The two languages: complete, deterministic, labelled word by word, and really different."""

import random
import re
from statistics import mean

import pytest

from dpa.lab.language import COUNTS, LANGUAGES, SYNONYMS, caption
from dpa.lab.scenes import BACKGROUNDS, COLOURS, COLUMNS, ROWS, SHAPES, SIZES, TEXTURES, Scene, draw_scene

SCENES = [draw_scene(11, index) for index in range(400)]
A_WORDS = {word for phrase in SYNONYMS for word in phrase.split()}
B_WORDS = {word for words in SYNONYMS.values() for word in words}


def spoken(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text)


def visual_words(text: str, spans: tuple[tuple[int, int], ...]) -> list[str]:
    return [text[start:end] for start, end in spans]


def test_table_covers_the_world_and_is_unambiguous() -> None:
    places = {f"{row} {column}" for row in ROWS for column in COLUMNS}
    assert set(SYNONYMS) == {*SHAPES, *COLOURS, *SIZES, *TEXTURES, *BACKGROUNDS, *COUNTS[1:], *places}
    everything = [word for words in SYNONYMS.values() for word in words]
    assert len(everything) == len(set(everything)), "one word of B stands for one word of A"
    assert not A_WORDS & B_WORDS
    assert all(re.fullmatch("[a-z]+", word) for word in everything)


@pytest.mark.parametrize("language", LANGUAGES)
def test_deterministic(language: str) -> None:
    one = [caption(scene, language, random.Random(index)) for index, scene in enumerate(SCENES)]
    two = [caption(scene, language, random.Random(index)) for index, scene in enumerate(SCENES)]
    assert one == two


@pytest.mark.parametrize("language", LANGUAGES)
def test_spans_are_whole_words_in_order(language: str) -> None:
    rng = random.Random(0)
    for scene in SCENES:
        said = caption(scene, language, rng)
        words = [match.span() for match in re.finditer(r"[a-z]+", said.text)]
        assert list(said.visual_spans) == sorted(set(said.visual_spans))
        assert set(said.visual_spans) <= set(words)
        assert said.text == said.text.strip()
        assert "  " not in said.text
        assert not re.search(r"[{}]", said.text)


@pytest.mark.parametrize("language", LANGUAGES)
def test_visual_words_are_the_tables_words_and_no_others(language: str) -> None:
    rng = random.Random(1)
    own, other = (A_WORDS, B_WORDS) if language == "a" else (B_WORDS, A_WORDS)
    for scene in SCENES:
        said = caption(scene, language, rng)
        visual = visual_words(said.text, said.visual_spans)
        assert set(visual) <= own
        assert len(visual) == len([word for word in spoken(said.text) if word in own]), said.text
        assert not other & set(spoken(said.text)), said.text


def facts_from_a(text: str) -> set[tuple[str, ...]]:
    phrase = rf"({'|'.join(SIZES)}) ({'|'.join(TEXTURES)}) ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
    place = rf"({'|'.join(ROWS)}) ({'|'.join(COLUMNS)})"
    return set(re.findall(rf"{phrase} {place}", text))


def truth(scene: Scene) -> set[tuple[str, ...]]:
    return {(t.size, t.texture, t.colour, t.shape, ROWS[t.row], COLUMNS[t.column]) for t in scene.things}


def test_a_says_everything_once_and_correctly() -> None:
    rng = random.Random(2)
    for scene in SCENES:
        said = caption(scene, "a", rng)
        assert facts_from_a(said.text) == truth(scene), said.text
        for count in set(spoken(said.text)) & set(COUNTS):
            assert count == COUNTS[len(scene.things)]
        for background in set(spoken(said.text)) & set(BACKGROUNDS):
            assert background == scene.background
        assert len(said.visual_spans) - 6 * len(scene.things) in (0, 1, 2)


def test_b_says_the_same_as_the_scene() -> None:
    back = {word: a_word for a_word, words in SYNONYMS.items() for word in words}
    rng = random.Random(3)
    for scene in SCENES:
        said = caption(scene, "b", rng)
        meant = sorted(back[word] for word in visual_words(said.text, said.visual_spans))
        expected = [COUNTS[len(scene.things)], scene.background]
        for thing in scene.things:
            expected += [thing.shape, thing.colour, thing.size, thing.texture, thing.place]
        assert meant == sorted(expected)
        # Attributes of one thing stand in one sentence, so a thing's words are neighbours.
        in_order = [back[word] for word in visual_words(said.text, said.visual_spans)][2:]
        groups = {frozenset(in_order[start : start + 5]) for start in range(0, len(in_order), 5)}
        assert groups == {frozenset((t.shape, t.colour, t.size, t.texture, t.place)) for t in scene.things}


def test_articles_fit() -> None:
    rng = random.Random(4)
    for scene in SCENES:
        for language in LANGUAGES:
            text = caption(scene, language, rng).text
            assert not re.search(r"\ba [aeiou]", text), text
            assert not re.search(r"\ban [^aeiou]", text), text


def test_lengths() -> None:
    rng = random.Random(5)
    scenes = [draw_scene(12, index, minimum=3, maximum=3) for index in range(300)]
    tokens = {
        language: mean(len(re.findall(r"[a-z]+|[^a-z\s]", caption(scene, language, rng).text)) for scene in scenes)
        for language in LANGUAGES
    }
    assert 25 <= tokens["a"] <= 35
    assert 80 <= tokens["b"] <= 100
    assert 2.7 <= tokens["b"] / tokens["a"] <= 3.5


def test_thousands_of_surface_forms_for_one_scene() -> None:
    scene = draw_scene(13, 0, minimum=3, maximum=3)
    rng = random.Random(6)
    assert len({caption(scene, "a", rng).text for _ in range(5000)}) > 2000
    assert len({caption(scene, "b", rng).text for _ in range(5000)}) > 4000


def test_visual_share_separates_the_languages() -> None:
    rng = random.Random(7)
    share = {language: mean(caption(s, language, rng).visual_share for s in SCENES) for language in LANGUAGES}
    assert share["a"] > 0.5
    assert share["b"] < 0.3


def test_synonyms_put_bs_words_into_as_grammar() -> None:
    rng = random.Random(8)
    for scene in SCENES:
        said = caption(scene, "a", rng, synonyms=True)
        visual = visual_words(said.text, said.visual_spans)
        assert set(visual) <= B_WORDS | set(COUNTS)
        assert "!" not in said.text


def test_form_does_not_depend_on_what_is_seen() -> None:
    """Replace the visual words by blanks: scenes with as many things share their forms."""
    one, other = (draw_scene(14, index, minimum=3, maximum=3) for index in (0, 1))
    for language in LANGUAGES:
        blanked = []
        for scene in (one, other):
            said = caption(scene, language, random.Random(9))
            text = said.text
            for start, end in reversed(said.visual_spans):
                text = f"{text[:start]}_{text[end:]}"
            blanked.append(re.sub(r"\ban\b", "a", text))
        assert blanked[0] == blanked[1]


def test_unknown_language() -> None:
    with pytest.raises(ValueError, match="'c'"):
        caption(SCENES[0], "c", random.Random(0))  # type: ignore[arg-type]
