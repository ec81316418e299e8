"""``dpa data check``'s figures: every kind of fault is counted where it belongs, and the verdict is training's own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dpa.data.check as module
import dpa.data.loader as loader_module
import dpa.data.text_pass as text_module
from dpa.data.audit import audit, examine
from dpa.data.check import Spread, StageCheck, check_stage
from dpa.errors import DataError
from tests.unit.data.helpers import chat_row, make_image, make_stage, open_file, write_json

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


def faulty(folder: Path) -> list[dict[str, Any]]:
    """Ten samples, six of which training leaves out."""
    make_image(folder / "a.png", (10, 7), seed=1)
    shutil.copy(folder / "a.png", folder / "copy.png")
    shutil.copy(folder / "a.png", folder / "again.png")
    make_image(folder / "big.png", (40, 30), seed=2)
    (folder / "broken.png").write_bytes((folder / "a.png").read_bytes()[:-30])
    return [
        chat_row("good", "<image>\nQ", "A", image="a.png"),
        chat_row("same", "<image>\nQ", "AAAA", image="copy.png"),
        chat_row("two", "<image> <image>\nQ", "A", image=["again.png", "big.png"]),
        chat_row("text", "Q", "A"),
        chat_row("missing", "<image>\nQ", "A", image="no.png"),
        chat_row("broken", "<image>\nQ", "A", image="broken.png"),
        chat_row("markers", "<image> <image>\nQ", "A", image="a.png"),
        chat_row("empty", "Q", ""),
        chat_row("masked", "Q" * 500, "A"),
        chat_row("outside", "<image>\nQ", "A", image="../a.png"),
    ]


def check(folder: Path, rows: list[dict[str, Any]], max_bad_share: float = 1.0, **changes: Any) -> StageCheck:
    data = make_stage([open_file(write_json(folder / "a.json", rows), folder / "cache")], **changes)
    found = examine(data, cache_dir=folder / "cache")
    return check_stage(data, found, stage="finetune", max_bad_share=max_bad_share)


def test_every_fault_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HUGE_PIXELS", 1000)
    found = check(tmp_path, faulty(tmp_path))
    assert (found.samples, found.usable, found.with_image, found.several_images, found.text_only) == (10, 4, 7, 1, 3)
    assert {problem.kind: problem.samples for problem in found.problems} == {
        "image missing": 1,
        "image unreadable": 1,
        "image path refused": 1,
        "images and markers differ": 1,
        "nothing to learn": 1,
        "no supervised token": 1,
    }
    (masked,) = (problem for problem in found.problems if problem.kind == "no supervised token")
    assert masked.examples[0]["id"] == "masked"
    assert masked.examples[0]["where"].endswith("a.json, record 9")
    images = found.images
    assert images is not None
    assert (images.references, images.different, images.check) == (8, 7, "decoded")
    assert images.problems == {"image missing": 1, "image unreadable": 1, "image path refused": 1}
    assert (images.duplicates, images.duplicate_examples) == (2, (("a.png", "copy.png", "again.png"),))
    assert (images.huge, images.huge_examples) == (1, ("big.png",))
    assert images.width is not None
    assert (images.width.least, images.width.most) == (10, 40)
    assert found.sources[0].bad == 6
    json.dumps(found.to_dict())


def test_figures_are_those_of_training(tmp_path: Path) -> None:
    rows = faulty(tmp_path)
    found = check(tmp_path, rows, max_length=60)
    data = make_stage([open_file(tmp_path / "a.json", tmp_path / "cache")], max_length=60)
    trained = audit(data, max_bad_share=1.0, cache_dir=tmp_path / "other")
    assert found.usable == len(trained.kept)
    assert found.all_tokens == int(trained.lengths.sum())
    assert found.supervised_tokens == trained.supervised_tokens
    assert (found.cut_samples, found.cut_tokens) == (trained.cut_samples, trained.cut_tokens)


@pytest.mark.parametrize(("share", "refused"), [(0.6, False), (0.59, True)])
def test_the_verdict_is_training_s(tmp_path: Path, share: float, refused: bool) -> None:
    found = check(tmp_path, faulty(tmp_path), max_bad_share=share)
    assert (found.refusal is not None) == refused
    data = make_stage([open_file(tmp_path / "a.json", tmp_path / "cache")])
    if refused:
        with pytest.raises(DataError) as caught:
            audit(data, max_bad_share=share, cache_dir=tmp_path / "cache")
        assert str(caught.value) == found.refusal
    else:
        audit(data, max_bad_share=share, cache_dir=tmp_path / "cache")


def test_nothing_usable_at_all(tmp_path: Path) -> None:
    found = check(tmp_path, [chat_row("s", "Q", "")])
    assert (found.tokens, found.usable, found.examples) == (None, 0, ())
    assert found.refusal is not None
    assert "none of 1 samples can be used" in found.refusal


def test_samples_to_look_at_are_usable_and_of_both_kinds(tmp_path: Path) -> None:
    make_image(tmp_path / "a.png")
    rows = [chat_row(f"i{n}", "<image>\nQ", "A" if n % 2 else "", image="a.png") for n in range(40)]
    rows += [chat_row(f"t{n}", "Q", "A") for n in range(40)]
    shown = check(tmp_path, rows).examples
    assert len(set(shown)) == 12
    assert sum(place < 40 for place in shown) == 9
    assert all(place >= 40 or place % 2 for place in shown)


def test_slow_parquet_files_get_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.unit.data.test_sources import as_kind

    monkeypatch.setattr(module, "SLOW_ROW_GROUP_MB", 1e-5)
    for kind, notes in (("folder", 1), ("save_to_disk", 0)):
        data = make_stage([open_file(as_kind(kind, tmp_path), tmp_path / "cache")])
        found = check_stage(data, examine(data, cache_dir=tmp_path / "cache"), stage="finetune", max_bad_share=0)
        assert len(found.sources[0].notes) == notes
        assert (found.sources[0].files, found.sources[0].samples) == (2, 13)


@pytest.mark.parametrize(
    "values", [[5], [5, 5], [1, 2], list(range(1000)), [1] * 200 + [10**6], [0] * 5 + [3] * 5, [7, 10**9]]
)
def test_histograms_hold_every_value(values: list[int]) -> None:
    spread = Spread.of(np.array(values))
    assert spread is not None
    assert sum(spread.counts) == len(values)
    assert len(spread.edges) == len(spread.counts) + 1
    assert (spread.least, spread.most) == (min(values), max(values))
    assert all(low < high for low, high in zip(spread.edges, spread.edges[1:], strict=False))
    assert len(spread.counts) <= 25


def test_an_interrupted_text_pass_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_module, "_CHUNK", 2)
    monkeypatch.setattr(text_module, "_SEGMENT", 2)
    rows = [chat_row(f"s{n}", "Q", "A" * (n % 5)) for n in range(19)]
    data = make_stage([open_file(write_json(tmp_path / "a.json", rows), tmp_path / "cache")])
    whole = examine(data, cache_dir=tmp_path / "other")
    seen: list[str] = []
    encode = data.encode

    def counting(sample: Any) -> Any:
        if sample.id == "s9" and "s9" not in seen:
            seen.append(sample.id)
            raise KeyboardInterrupt
        seen.append(sample.id)
        return encode(sample)

    monkeypatch.setattr(data, "encode", counting)
    with pytest.raises(KeyboardInterrupt):
        examine(data, cache_dir=tmp_path / "cache")
    assert seen == [f"s{n}" for n in range(10)]
    seen.append("again")
    done: list[int] = []
    again = examine(data, cache_dir=tmp_path / "cache", progress=lambda done_now, total: done.append(done_now))
    assert seen[seen.index("again") + 1] == "s8"  # segments of four: two were kept
    assert len(seen) == 10 + 1 + 11
    assert done[0] == 10
    assert again.text.lengths.tolist() == whole.text.lengths.tolist()
    assert again.problems == whole.problems
    assert not list((tmp_path / "cache" / "audit").glob("*.parts"))


def test_workers_check_images_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = faulty(tmp_path)
    one = check(tmp_path, rows)
    monkeypatch.setattr(loader_module, "PARALLEL_FROM", 1)
    monkeypatch.setattr(loader_module, "workers_for", lambda count: 2)
    monkeypatch.setattr("dpa.data.image_check.workers_for", lambda count: 2)
    monkeypatch.setattr("dpa.data.image_check._CHUNK", 3)
    data = make_stage([open_file(tmp_path / "a.json", tmp_path / "cache")])
    for _ in range(2):  # found, and then remembered
        found = examine(data, cache_dir=tmp_path / "fresh")
        assert check_stage(data, found, stage="finetune", max_bad_share=1.0) == one
