"""Caches change no bit of a run: not the one that makes them, not one that finds them, not one that was killed."""

from __future__ import annotations

import os
import random
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dpa.data import cached
from dpa.testing.processes import run_killed
from tests.invariants.test_resume import assert_same_bits, interrupt
from tests.stages import Options, Trained, run

OPTIONS = Options(stage="pretrain", max_steps=6, save_steps=2, micro_batch=3, cached=("text", "vision"))


def with_cache(folder: Path, options: Options = OPTIONS) -> Options:
    return replace(options, caches=str(folder))


def small_chunks() -> None:
    cached._CHUNK_TOKENS, cached._CHUNK_IMAGES = 1, 1


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cached, "_CHUNK_TOKENS", 1)
    monkeypatch.setattr(cached, "_CHUNK_IMAGES", 1)


def test_who_makes_it_and_who_finds_it(tmp_path: Path) -> None:
    made = run(tmp_path / "made", with_cache(tmp_path / "caches"))
    assert_same_bits(run(tmp_path / "found", with_cache(tmp_path / "caches")), made)
    assert_same_bits(run(tmp_path / "anew", with_cache(tmp_path / "elsewhere", replace(OPTIONS, workers=1))), made)


@pytest.mark.parametrize("lost", [False, True])
def test_continued(tmp_path: Path, lost: bool) -> None:
    """Also where the cache was removed in between."""
    whole = run(tmp_path / "whole", with_cache(tmp_path / "caches"))
    interrupt(tmp_path / "again", with_cache(tmp_path / "others"), 3)
    again = run(tmp_path / "again", with_cache(tmp_path / ("third" if lost else "others")))
    assert again.result.resumed_from == 2
    assert_same_bits(again, whole)


def run_until(work: Path, options: Options, writes: int) -> Trained:
    """Kills its own process in the middle of the cache's write number ``writes``."""
    small_chunks()
    write, made = os.pwrite, 0

    def counted(handle: int, data: bytes, start: int) -> int:
        nonlocal made
        made += 1
        if made == writes:
            write(handle, data[: len(data) // 2], start)
            os.kill(os.getpid(), signal.SIGKILL)
        return write(handle, data, start)

    os.pwrite = counted  # type: ignore[assignment]
    return run(work, options)


def test_killed_while_it_is_filled(tmp_path: Path) -> None:
    """A chain of starts that share a cache, each killed in another write: values, digests, text, features."""
    whole = run(tmp_path / "whole", with_cache(tmp_path / "caches"))
    options = with_cache(tmp_path / "others")
    for writes in (1, 2, 7, 24, 31):
        fine, _ = run_killed(run_until, tmp_path / "again", options, writes)
        assert not fine
    fine, trained = run_killed(run_until, tmp_path / "again", options, 0)
    assert fine
    assert_same_bits(trained, whole)
    for kind in ("text", "vision"):
        (one,), (other,) = (list((tmp_path / name).glob(f"{kind}-*/values.bin")) for name in ("caches", "others"))
        assert one.read_bytes() == other.read_bytes()


def slow(work: Path, options: Options) -> Any:
    small_chunks()
    return run(work, options)


def test_killed_at_random_moments(tmp_path: Path) -> None:
    """By the clock: while filling, in steps, in saves, reader processes included."""
    options = replace(OPTIONS, max_steps=30, workers=1)
    whole = run(tmp_path / "whole", with_cache(tmp_path / "caches", options))
    draw, kills = random.Random(1), 0
    for _ in range(4):
        fine, _ = run_killed(
            slow, tmp_path / "again", with_cache(tmp_path / "others", options), after=draw.uniform(0.05, 0.6)
        )
        kills += not fine
    assert kills >= 2
    fine, trained = run_killed(slow, tmp_path / "again", with_cache(tmp_path / "others", options))
    assert fine
    assert_same_bits(trained, whole)
