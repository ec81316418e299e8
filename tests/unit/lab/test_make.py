"""The data set on disk: formats, disjoint scenes, same bytes, atomic and careful with other people's folders."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dpa.errors import UserError
from dpa.lab import make
from dpa.lab.make import LabManifest, make_lab, read_manifest

SMALL = {"caption_scenes": 12, "instruction_scenes": 20, "heldout_scenes": 10, "text_only_share": 0.2}


def small(out: Path, **changes: Any) -> LabManifest:
    return make_lab(out, **{**SMALL, **changes})


def content(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lab") / "data"
    small(folder)
    return folder


def load(folder: Path, name: str) -> list[dict[str, Any]]:
    text = (folder / name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()] if name.endswith("jsonl") else json.loads(text)


def test_files_counts_and_digests(lab: Path) -> None:
    names = {name for name in content(lab) if not name.startswith("images/")}
    assert names == {"captions_a.json", "captions_b.json", "instructions.json", "questions.jsonl", "lab.json"}
    manifest = read_manifest(lab)
    assert manifest is not None
    assert manifest.counts["captions"] == 12
    assert manifest.counts["instructions"] == 20
    assert manifest.counts["instructions_without_image"] == 4
    assert manifest.counts["images"] == 12 + 16 + 10 == len(list((lab / "images").iterdir()))
    assert manifest.files == {name: digest for name, digest in content(lab).items() if name in manifest.files}
    assert len(manifest.files) == 4


def test_captions_follow_llava_and_mark_their_visual_words(lab: Path) -> None:
    a, b = load(lab, "captions_a.json"), load(lab, "captions_b.json")
    assert [(record["id"], record["image"]) for record in a] == [(record["id"], record["image"]) for record in b]
    for record in a + b:
        human, gpt = record["conversations"]
        assert human == {"from": "human", "value": "<image>\nDescribe the scene."}
        assert gpt["from"] == "gpt"
        words = [gpt["value"][start:end] for start, end in record["visual_spans"]]
        assert words
        assert all(word.isalpha() for word in words)
        with Image.open(lab / record["image"]) as picture:
            assert picture.size == (96, 96)
    assert sum(len(record["conversations"][1]["value"]) for record in b) > 1.5 * sum(
        len(record["conversations"][1]["value"]) for record in a
    )


def test_instructions_are_turns_with_the_image_or_a_description_first(lab: Path) -> None:
    records = load(lab, "instructions.json")
    assert len({record["id"] for record in records}) == len(records)
    for record in records:
        turns = record["conversations"]
        assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
        first, *later = [turn["value"] for turn in turns[::2]]
        assert all("<image>" not in text and "\n" not in text and text.endswith("?") for text in later)
        opening, question = first.split("\n")
        assert question.endswith("?")
        if "image" in record:
            assert opening == "<image>"
            assert (lab / record["image"]).is_file()
        else:
            assert "<image>" not in first
            assert len(opening.split()) > 4


def test_heldout_questions_name_their_scene_and_choices(lab: Path) -> None:
    records = load(lab, "questions.jsonl")
    assert len({record["id"] for record in records}) == len(records)
    for record in records:
        assert record["answer"] in record["choices"]
        assert (lab / record["image"]).is_file()
        assert set(record) == {"id", "scene", "image", "question", "answer", "kind", "form", "choices"}


def test_no_picture_is_shared_between_parts(lab: Path) -> None:
    # draw_scene is the only source, and a scene's content is compared, not its key: look at what was drawn.
    manifest = read_manifest(lab)
    assert manifest is not None
    for settings in (manifest.settings, make.LabSettings(5, 4000, 2000, 400, 0.1, 4)):
        parts = make._draw(settings)
        contents = [
            {(scene.background, scene.things) for scene in scenes}
            for scenes in (parts.heldout, parts.instruction, parts.text, parts.caption)
        ]
        assert sum(map(len, contents)) == len(set().union(*contents))
        keys = [scene.key for scene in (*parts.heldout, *parts.instruction, *parts.text, *parts.caption)]
        assert len(keys) == len(set(keys))


def test_same_settings_same_bytes_in_parallel_too(lab: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make, "_FEW", 0)
    monkeypatch.setattr(make.os, "cpu_count", lambda: 2)
    seen: list[tuple[int, int]] = []
    small(tmp_path / "other", progress=lambda done, total: seen.append((done, total)))
    assert content(tmp_path / "other") == content(lab)
    assert seen == [(done, 38) for done in range(1, 39)]


def test_another_seed_is_another_world_and_heldout_ignores_other_sizes(lab: Path, tmp_path: Path) -> None:
    small(tmp_path / "seed", seed=1)
    assert not set(content(lab).values()) & set(content(tmp_path / "seed").values())
    small(tmp_path / "more", caption_scenes=13, instruction_scenes=21)
    assert content(tmp_path / "more")["questions.jsonl"] == content(lab)["questions.jsonl"]


def test_identical_folder_is_reused_and_a_damaged_one_made_again(tmp_path: Path) -> None:
    out = tmp_path / "data"
    assert not small(out).reused
    before = content(out)
    stamp = (out / "lab.json").stat().st_mtime_ns
    assert small(out).reused
    assert (out / "lab.json").stat().st_mtime_ns == stamp
    next((out / "images").iterdir()).unlink()
    assert not small(out).reused
    (out / "questions.jsonl").write_text("{}\n")
    assert not small(out).reused
    assert content(out) == before
    assert not small(out, seed=2).reused
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_foreign_folders_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match=r"thesis\.tex"):
        small(tmp_path / "mine")
    out = tmp_path / "data"
    small(out)
    (out / "notes.txt").write_text("x")
    assert small(out).reused
    with pytest.raises(UserError, match=r"notes\.txt"):
        small(out, seed=1)
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file"):
        small(tmp_path / "file")
    (tmp_path / "new.partial").mkdir()
    (tmp_path / "new.partial" / "x").write_text("x")
    with pytest.raises(UserError, match="in the way"):
        small(tmp_path / "new")
    assert (tmp_path / "new.partial" / "x").exists()


def test_an_interrupted_write_leaves_nothing_at_the_place_and_is_cleared(
    lab: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(done: int, total: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        small(tmp_path / "data", progress=stop)
    assert not (tmp_path / "data").exists()
    small(tmp_path / "data")
    assert content(tmp_path / "data") == content(lab)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


@pytest.mark.parametrize(
    ("setting", "value"),
    [("seed", -1), ("seed", 900_000), ("caption_scenes", 0), ("heldout_scenes", 0), ("text_only_share", 1.5)],
)
def test_settings_out_of_range(tmp_path: Path, setting: str, value: float) -> None:
    with pytest.raises(UserError, match=f"{setting} is {value}"):
        small(tmp_path / "data", **{setting: value})
