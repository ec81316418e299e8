"""SIGKILL at any moment, then the same call again: the bits of an uninterrupted run, no step twice, none missing."""

from __future__ import annotations

import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dpa.testing.processes import run_killed
from tests.stages import Options, Trained, digest, run

OPTIONS = Options(stage="proxy", dropout=0.2, max_steps=6, save_steps=2, micro_batch=3)

DANGEROUS = ("write", "fsync", "replace", "ftruncate", "pread")
"""What touches files, in ``os``; ``shutil.rmtree`` beside them."""


def run_until(work: Path, options: Options, calls: int) -> tuple[Trained, int]:
    """Kills its own process *instead of* the file operation number ``calls``; returns how many there were."""
    made = 0

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            nonlocal made
            made += 1
            if made == calls:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **named)

        return call

    for name in DANGEROUS:
        setattr(os, name, counted(getattr(os, name)))
    shutil.rmtree = counted(shutil.rmtree)  # type: ignore[assignment]
    trained = run(work, options)
    return trained, made


def assert_same(found: Trained, expected: Trained) -> None:
    assert found.rows == expected.rows
    assert digest(found.weights) == digest(expected.weights)


def test_at_file_operations(tmp_path: Path) -> None:
    """A chain of starts, each killed at another operation: first write, inside saves, at renames, while continuing."""
    whole = run(tmp_path / "whole", OPTIONS)
    fine, (counted, operations) = run_killed(run_until, tmp_path / "counted", OPTIONS, 0)
    assert fine
    assert_same(counted, whole)
    assert operations > 30, "the process must be killed inside saves, too"
    work, kills = tmp_path / "again", 0
    for calls in (1, 3, 5, 7, 9, 11, 13, 14, 15, 16, 17, 18, 20, 22):
        fine, _ = run_killed(run_until, work, OPTIONS, calls)
        kills += not fine
    assert kills >= 8
    fine, (trained, _) = run_killed(run_until, work, OPTIONS, 0)
    assert fine
    assert_same(trained, whole)


def test_at_random_moments(tmp_path: Path) -> None:
    """By the clock, wherever the process is, reader processes included."""
    options = Options(max_steps=150, save_steps=5, workers=1)
    whole = run(tmp_path / "whole", options)
    draw, work, kills = random.Random(0), tmp_path / "again", 0
    for _ in range(6):
        fine, _ = run_killed(run, work, options, after=draw.uniform(0.1, 0.8))
        kills += not fine
    assert kills >= 2
    fine, trained = run_killed(run, work, options)
    assert fine
    assert_same(trained, whole)
