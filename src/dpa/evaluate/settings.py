"""Settings of the evaluation that a run ends with."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from dpa.settings import Strict


class EvaluateSettings(Strict):
    """Which benchmarks, on which files."""

    benchmarks: tuple[Literal["lab"], ...] = ()
    """Empty: the run ends with the checkpoint."""
    data: Path | None = None
    """Folder of the benchmarks' files; for ``lab`` the folder that ``dpa lab make`` wrote (``questions.jsonl``)."""
    batch_size: int = Field(default=64, ge=1)
    max_new_tokens: int = Field(default=16, ge=1)
    limit: int | None = Field(default=None, ge=1)
    """First so many questions; None: all."""
    blind: bool = True
    """Also ask without the image: the accuracy that the question alone gives away."""
    rank_options: bool = False
    """Multiple choice also by the log-probability of each option: a second accuracy, under ``ranked``."""
    devices: int | Literal["auto"] = 1
    """Accelerators that share the questions, each with a copy of the model in a process of its own; ``auto``: all of
    this machine. Without any accelerator a number is that of processes on the CPU."""
    every_steps: int | None = Field(default=None, ge=1)
    """Also after every so many optimizer steps of stage 3; figures go to metrics.jsonl. None: at the end alone."""
    every_limit: int = Field(default=64, ge=1)
    """First so many questions of each benchmark in those."""

    @field_validator("devices")
    @classmethod
    def _at_least_one(cls, value: int | str) -> int | str:
        if value != "auto" and int(value) < 1:
            raise ValueError("devices must be auto or at least 1")
        return value
