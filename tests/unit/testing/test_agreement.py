"""Must-show: for every family our forward's logits equal transformers' own for the same text."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from dpa.models import attention
from dpa.models.families import FAMILIES
from dpa.models.vlm import head
from dpa.testing import agreement
from dpa.testing.agreement import CASES, WINDOW, measure
from dpa.testing.parts import WINDOWED, TinyFamily


def test_every_family_is_measured() -> None:
    measured = {family for family, _ in CASES}
    assert set(FAMILIES) <= measured
    assert {family for family, window in CASES if window == WINDOW} == set(WINDOWED)


@pytest.mark.parametrize(("family", "window"), CASES)
def test_float64(tmp_path: Path, family: TinyFamily, window: int | None) -> None:
    found = measure(tmp_path, family, window=window, dtype=torch.float64)
    # Gemma-2's eager attention takes its softmax in float32 whatever comes in; sdpa is float64 throughout
    limit = 2e-6 if found.attention == "eager" else 1e-10
    # the mean row of a grown head is rounded to the head's dtype on another way: 1e-11
    assert max(found.logits, found.packed, found.text_only, found.image) < limit
    assert found.loss < 2e-6  # transformers' loss is float32
    assert found.largest > 1, "logits that say something"


@pytest.mark.parametrize(("family", "window"), [case for case in CASES if case[1] is not None])
def test_float32(tmp_path: Path, family: TinyFamily, window: int | None) -> None:
    found = measure(tmp_path, family, window=window, dtype=torch.float32)
    numbers = (found.logits, found.packed, found.text_only, found.image, found.loss)
    assert all(math.isfinite(number) for number in numbers)
    assert max(numbers) < 1e-5  # rounding of sums in another order; logits are about 2


def test_a_missing_soft_cap_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "head", lambda model: (head(model)[0], None))
    found = measure(tmp_path, "gemma2", window=None, dtype=torch.float32)
    assert found.logits > 0.01


@pytest.mark.parametrize("family", ["qwen3", "gemma3", "phi3"])
def test_a_missing_window_would_be_seen(tmp_path: Path, family: TinyFamily, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "sliding_window", lambda config: 10_000)
    found = measure(tmp_path, family, window=WINDOW, dtype=torch.float32)
    assert found.logits < 1e-5, "padded: transformers' own masks"
    assert found.packed > 0.001
