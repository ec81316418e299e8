"""The pass before training: what is left out and why, what is remembered, what changes the digest."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dpa.data.audit as audit_module
import dpa.data.image_check as check_module
import dpa.data.loader as loader_module
import dpa.data.text_pass as text_module
from dpa.data.audit import Audit, audit
from dpa.data.dataset import StageData
from dpa.data.loader import make_loader
from dpa.data.sampler import BatchPlan
from dpa.errors import DataError, StorageError
from tests.unit.data.helpers import (
    caption_row,
    chat_row,
    make_image,
    make_rules,
    make_stage,
    make_tokenizer,
    make_transform,
    open_file,
    write_json,
)

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


def good_rows(folder: Path, count: int = 6) -> list[dict[str, Any]]:
    """Every other one has an image."""
    rows = []
    for number in range(count):
        name = f"{number}.png" if number % 2 else None
        if name:
            make_image(folder / name, seed=number)
        rows.append(chat_row(f"s{number}", "<image>\nQ" if name else "Q", "A" * (number + 1), image=name))
    return rows


def stage_of(folder: Path, rows: list[dict[str, Any]], name: str = "a.json", **changes: Any) -> StageData:
    return make_stage([open_file(write_json(folder / name, rows), folder / "cache")], **changes)


def run(stage: StageData, folder: Path, max_bad_share: float = 1.0) -> Audit:
    return audit(stage, max_bad_share=max_bad_share, cache_dir=folder / "cache")


def test_counts(tmp_path: Path) -> None:
    stage = stage_of(tmp_path, good_rows(tmp_path))
    found = run(stage, tmp_path, 0.0)
    assert found.samples == 6
    assert found.kept.tolist() == list(range(6))
    assert found.quarantined == ()
    assert found.has_image.tolist() == [False, True] * 3
    assert found.lengths.tolist() == [len(stage[index].encoded.input_ids) for index in range(6)]
    assert found.supervised_tokens == sum(number + 2 for number in range(6))  # the answer and its end of turn
    assert (found.cut_samples, found.cut_tokens) == (0, 0)
    assert (found.images, found.image_check) == (3, "decoded")
    assert found.kept.dtype == np.int64
    assert found.lengths.dtype == np.int32
    assert found.has_image.dtype == np.bool_


def bad_rows(folder: Path) -> list[tuple[dict[str, Any], str, str]]:
    """Row, kind, and what the reason names."""
    make_image(folder / "good.png")
    whole = make_image(folder / "whole.jpg", (64, 64)).read_bytes()
    (folder / "half.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "text.png").write_text("hello")
    (folder / "folder.png").mkdir()
    make_image(folder / "large.png", (1001, 1000))
    make_image(folder / "thin.png", (200_000, 1))

    def with_image(name: str) -> dict[str, Any]:
        return chat_row("bad", "<image>\nQ", "A", image=name)

    return [
        (with_image("none.png"), "image missing", "none.png does not exist"),
        (with_image("half.jpg"), "image unreadable", "truncated"),
        (with_image("text.png"), "image unreadable", "not an image"),
        (with_image("folder.png"), "image unreadable", "is not a file"),
        (with_image("good.png/x.png"), "image missing", "does not exist"),
        (with_image("large.png"), "image too large", "1001 x 1000 = 1001000 pixels, allowed are 1000000"),
        (with_image("thin.png"), "image too large", "200000 x 1 pixels"),
        (with_image("../a.png"), "image path refused", "'../a.png'"),
        (chat_row("bad", "<image> <image>", "A", image="good.png"), "images and markers differ", "1 image(s), 2"),
        (chat_row("bad", "<image> Q", "A"), "images and markers differ", "0 image(s), 1"),
        (chat_row("bad", "Q", ""), "nothing to learn", "empty"),
        ({"id": "bad", "conversations": [{"from": "human", "value": "Q"}]}, "nothing to learn", "no assistant turn"),
        (chat_row("bad", "Q", "x <|im_end|>"), "control token in text", "<|im_end|>"),
        (chat_row("bad", "Q" * 500, "A"), "no supervised token", "max_length 400"),
        (chat_row("bad", "Q" * 500 + "<image><image>", "A", image=["good.png"] * 2), "too long", "max_length is 400"),
    ]


def test_every_reason(tmp_path: Path) -> None:
    cases = bad_rows(tmp_path)
    rows = [*good_rows(tmp_path), *(row for row, _, _ in cases)]
    found = run(stage_of(tmp_path, rows), tmp_path)
    assert found.kept.tolist() == list(range(6))
    for case, (item, (_, kind, detail)) in enumerate(zip(found.quarantined, cases, strict=True)):
        assert item.index == 6 + case
        assert item.id == "bad"
        assert item.where == f"{tmp_path / 'a.json'}, record {7 + case}"
        assert item.kind == kind
        assert detail in item.reason
    summary = found.summary()
    assert json.loads(json.dumps(summary)) == summary
    assert summary["quarantined_by_kind"]["image unreadable"] == 3
    assert summary["quarantined"] == len(cases)
    assert len(summary["quarantined_first"]) == 5


def test_what_is_kept_trains(tmp_path: Path) -> None:
    rows = [
        row
        for pair in zip(good_rows(tmp_path), (row for row, _, _ in bad_rows(tmp_path)), strict=False)
        for row in pair
    ]
    stage = stage_of(tmp_path, rows)
    found = run(stage, tmp_path)
    plan = BatchPlan(
        found.lengths,
        found.has_image,
        global_batch=4,
        micro_batch=2,
        ranks=1,
        seed=0,
        group_by_length=True,
        epochs=1,
    )
    kept = stage.select(found.kept)
    ids = [name for item in make_loader(kept, plan, 0, 0, stage.rules, 0, False) for name in item.batch.sample_ids]
    assert sorted(ids) == [f"s{number}" for number in range(6)]


def test_the_limit_is_strict_and_per_source(tmp_path: Path) -> None:
    bad = chat_row("bad", "Q", "")
    half = [*good_rows(tmp_path, 1), bad]
    assert len(run(stage_of(tmp_path, half), tmp_path, 0.5).quarantined) == 1
    with pytest.raises(DataError) as caught:
        run(stage_of(tmp_path, half), tmp_path, 0.499)
    message = str(caught.value)
    assert "a.json: 1 of 2 samples cannot be used, 50.00%; allowed is 49.90% (data.max_bad_share)" in message
    assert "1 x nothing to learn" in message
    assert f"sample 'bad' ({tmp_path / 'a.json'}, record 2): nothing to learn" in message
    many = open_file(write_json(tmp_path / "b.json", good_rows(tmp_path, 6)), tmp_path / "cache")
    both = make_stage([many, *stage_of(tmp_path, half).sources])
    with pytest.raises(DataError, match=r"a\.json: 1 of 2 samples"):  # 1 of 8 over both
        run(both, tmp_path, 0.2)


def test_nothing_left(tmp_path: Path) -> None:
    rows = [chat_row(f"bad{number}", "Q", "") for number in range(7)]
    with pytest.raises(DataError, match=r"a\.json: none of 7 samples can be used\. 7 x nothing to learn") as caught:
        run(stage_of(tmp_path, rows), tmp_path)
    assert str(caught.value).count("sample 'bad") == 5
    assert str(caught.value).endswith("and 2 more")


def test_cut_samples_are_counted(tmp_path: Path) -> None:
    rows = [chat_row("a", "Q", "A"), chat_row("b", "Q", "A" * 500)]
    stage = stage_of(tmp_path, rows)
    found = run(stage, tmp_path)
    assert (found.cut_samples, found.cut_tokens) == (1, stage[1].encoded.cut)
    assert found.lengths[1] == 400


def test_text_only_stage_asks_for_no_image(tmp_path: Path) -> None:
    rows = [caption_row("s", "A dog.", image="missing.png")]
    stage = stage_of(tmp_path, rows, format="plain", with_images=False, transform=None)
    found = run(stage, tmp_path, 0.0)
    assert (found.images, found.image_check, found.has_image.tolist()) == (0, "none", [False])
    assert not (tmp_path / "cache" / "images.sqlite").exists()


def test_many_images_are_looked_at_by_their_headers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = good_rows(tmp_path)
    half = (tmp_path / "1.png").read_bytes()[:-30]
    (tmp_path / "1.png").write_bytes(half)
    (tmp_path / "3.png").write_text("no image at all")
    stage = stage_of(tmp_path, rows)
    monkeypatch.setattr(audit_module, "DECODE_UP_TO", 2)
    headers = run(stage, tmp_path)
    assert headers.image_check == "header"
    assert [item.id for item in headers.quarantined] == ["s3"]
    monkeypatch.setattr(audit_module, "DECODE_UP_TO", 3)
    decoded = run(stage, tmp_path)
    assert decoded.image_check == "decoded"
    assert [item.id for item in decoded.quarantined] == ["s1", "s3"]


def test_workers_give_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [*good_rows(tmp_path, 40), chat_row("bad", "Q", "")]
    stage = stage_of(tmp_path, rows)
    monkeypatch.setattr(text_module, "_CHUNK", 7)
    alone = run(stage, tmp_path)
    shutil.rmtree(tmp_path / "cache" / "audit")
    monkeypatch.setattr(loader_module, "PARALLEL_FROM", 1)
    together = run(stage, tmp_path)
    assert together.lengths.tolist() == alone.lengths.tolist()
    assert together.quarantined == alone.quarantined
    assert together.digest == alone.digest


def test_progress_reaches_the_end_with_and_without_the_cache(tmp_path: Path) -> None:
    stage = stage_of(tmp_path, good_rows(tmp_path))
    calls: list[tuple[int, int]] = []
    for _ in range(2):
        calls.clear()
        audit(stage, max_bad_share=0, cache_dir=tmp_path / "cache", progress=lambda *call: calls.append(call))
        assert calls == sorted(calls)
        assert calls[-1] == (9, 9)


# What is remembered


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often the expensive halves run."""
    counts = {"text": 0, "image": 0}
    compute, inspect = text_module._compute, check_module._inspect

    def counting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            counts[name] += 1
            return function(*args)

        return call

    monkeypatch.setattr(text_module, "_compute", counting("text", compute))
    monkeypatch.setattr(check_module, "_inspect", counting("image", inspect))
    return counts


def test_the_second_audit_reads_neither_texts_nor_images(tmp_path: Path, counted: dict[str, int]) -> None:
    rows = [*good_rows(tmp_path), *(row for row, _, _ in bad_rows(tmp_path))]
    first = run(stage_of(tmp_path, rows), tmp_path)
    before = dict(counted)
    assert before["text"] == 1
    again = run(stage_of(tmp_path, rows), tmp_path)
    assert counted == before
    assert again.quarantined == first.quarantined
    assert again.digest == first.digest
    assert again.lengths.tolist() == first.lengths.tolist()


def test_only_what_changed_is_done_again(tmp_path: Path, counted: dict[str, int]) -> None:
    rows = good_rows(tmp_path)
    run(stage_of(tmp_path, rows), tmp_path)
    make_image(tmp_path / "1.png", seed=99)
    run(stage_of(tmp_path, rows), tmp_path)
    assert counted == {"text": 1, "image": 4}
    run(stage_of(tmp_path, rows, max_length=300), tmp_path)
    assert counted == {"text": 2, "image": 4}
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["AA"])
    other = stage_of(tmp_path, rows)
    other.tokenizer = tokenizer
    run(other, tmp_path)
    assert counted == {"text": 3, "image": 4}
    other = stage_of(tmp_path, rows)
    other.rules = make_rules(make_tokenizer(), image_tokens=3, bos_id=None)
    run(other, tmp_path)
    assert counted == {"text": 4, "image": 4}
    run(stage_of(tmp_path, rows, max_image_pixels=500_000), tmp_path)
    assert counted == {"text": 4, "image": 7}


def test_padding_and_truncation_state_of_the_tokenizer_plays_no_part(tmp_path: Path, counted: dict[str, int]) -> None:
    rows = good_rows(tmp_path)
    run(stage_of(tmp_path, rows), tmp_path)
    other = stage_of(tmp_path, rows)
    other.tokenizer(["a", "bb"], padding=True, truncation=True, max_length=1)
    run(other, tmp_path)
    assert counted["text"] == 1


def test_damaged_caches_are_made_anew(tmp_path: Path, counted: dict[str, int]) -> None:
    rows = good_rows(tmp_path)
    first = run(stage_of(tmp_path, rows), tmp_path)
    (text,) = (tmp_path / "cache" / "audit").glob("text-*.npz")
    text.write_bytes(text.read_bytes()[:50])
    (tmp_path / "cache" / "images.sqlite").write_bytes(b"not a database, " * 100)
    again = run(stage_of(tmp_path, rows), tmp_path)
    assert counted == {"text": 2, "image": 6}
    assert again.digest == first.digest


def test_a_cache_that_cannot_be_written_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = good_rows(tmp_path)
    stage = stage_of(tmp_path, rows)
    (tmp_path / "cache" / "images.sqlite").mkdir()
    with pytest.raises(StorageError, match=r"images\.sqlite: .*unable to open database file"):
        run(stage, tmp_path)


# The digest


def test_the_digest_is_of_content_alone(tmp_path: Path) -> None:
    rows = good_rows(tmp_path / "here")
    first = run(stage_of(tmp_path / "here", rows), tmp_path / "here").digest
    shutil.copytree(tmp_path / "here", tmp_path / "there", ignore=shutil.ignore_patterns("cache"))
    for file in (tmp_path / "there").iterdir():
        os.utime(file, (1, 1))
    moved = run(stage_of(tmp_path / "there", rows), tmp_path / "there").digest
    assert moved == first
    other_transform = stage_of(tmp_path / "here", rows, transform=make_transform("pad"))
    assert run(other_transform, tmp_path / "here").digest == first


def test_the_digest_changes_with_what_training_sees(tmp_path: Path) -> None:
    rows = good_rows(tmp_path)
    digests = [run(stage_of(tmp_path, rows), tmp_path).digest]
    make_image(tmp_path / "1.png", seed=99)
    digests.append(run(stage_of(tmp_path, rows), tmp_path).digest)
    (tmp_path / "1.png").unlink()
    digests.append(run(stage_of(tmp_path, rows), tmp_path).digest)
    rows[0]["conversations"][1]["value"] = "another answer"
    digests.append(run(stage_of(tmp_path, rows), tmp_path).digest)
    limited = make_stage([open_file(tmp_path / "a.json", tmp_path / "cache", limit=4)])
    digests.append(run(limited, tmp_path).digest)
    twice = make_stage([*stage_of(tmp_path, rows).sources, *stage_of(tmp_path, rows).sources])
    digests.append(run(twice, tmp_path).digest)
    shorter = stage_of(tmp_path, [*rows, chat_row("long", "Q" * 350, "A")], max_length=350)
    digests.append(run(shorter, tmp_path).digest)
    assert len(set(digests)) == len(digests)


def test_swapped_images_change_the_digest(tmp_path: Path) -> None:
    rows = good_rows(tmp_path)
    first = run(stage_of(tmp_path, rows), tmp_path).digest
    (tmp_path / "1.png").rename(tmp_path / "x.png")
    (tmp_path / "3.png").rename(tmp_path / "1.png")
    (tmp_path / "x.png").rename(tmp_path / "3.png")
    assert run(stage_of(tmp_path, rows), tmp_path).digest != first
