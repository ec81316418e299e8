"""Settings of an evaluation: the one that a run ends with, and ``dpa eval``'s."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from dpa.settings import Strict

BenchmarkName = Literal["mmbench", "ai2d", "docvqa", "ocrbench", "cvbench", "mmvp", "naturalbench", "lab"]
PAPER: tuple[BenchmarkName, ...] = ("mmbench", "ai2d", "docvqa", "ocrbench", "cvbench", "mmvp", "naturalbench")
"""The paper's seven, in its order."""
SETS: dict[str, tuple[BenchmarkName, ...]] = {"paper": PAPER, "all": (*PAPER, "lab")}
"""Names for several at once."""


def expand_names(names: Iterable[str]) -> tuple[str, ...]:
    """Names of sets become their benchmarks; each benchmark once, in order of first mention."""
    return tuple(dict.fromkeys(one for name in names for one in SETS.get(name, (name,))))


class EvaluateSettings(Strict):
    """Which benchmarks, on which files."""

    benchmarks: tuple[BenchmarkName, ...] = ()
    """Names, also ``paper`` (its seven) and ``all`` (those and the lab). Empty: the run ends with the checkpoint."""
    data: Path | None = None
    """Folder of the benchmarks' files (docs/evaluation.md, "Data"); for ``lab`` the folder that ``dpa lab make`` wrote
    (``questions.jsonl``), or one that has it as ``lab/``."""
    batch_size: int = Field(default=64, ge=1)
    max_new_tokens: int | None = Field(default=None, ge=1)
    """None: each benchmark's own (``native.MAX_NEW_TOKENS``)."""
    limit: int | None = Field(default=None, ge=1)
    """At most so many questions of each benchmark, for a result marked partial. None: all, and none may be missing."""
    blind: bool | None = None
    """Also ask without the image: the accuracy that the question alone gives away. None: the lab only, since it doubles
    the time."""
    profile: Literal["paper", "strict"] = "paper"
    """Rules of scoring: those of the paper's toolkits, or strict ones (docs/evaluation.md, "Scores")."""
    vlmevalkit: Literal["2025-05", "2026-08"] = "2025-05"
    """Whose letter rules ``paper`` follows: VLMEvalKit's of the paper's time, or after it tightened them."""
    rank_options: bool = False
    """Multiple choice also by the log-probability of each option: a second accuracy, under ``ranked``."""
    devices: int | Literal["auto"] = 1
    """Accelerators that share the questions, each with a copy of the model in a process of its own; ``auto``: all of
    this machine. Without any accelerator a number is that of processes on the CPU."""
    every_steps: int | None = Field(default=None, ge=1)
    """Also after every so many optimizer steps of stage 3; figures go to metrics.jsonl. None: at the end alone."""
    every_limit: int = Field(default=64, ge=1)
    """At most so many questions of each benchmark in those."""
    after_pretrain: bool | Literal["probe"] = False
    """Also after stage 2: the original LLM with the connector, before it is taught to answer. ``probe``: its words
    alone (``probe_steps``), without the benchmarks, to which an LLM without stage 3 talks at length."""
    probe_steps: tuple[int, ...] = ()
    """Steps of stage 2 after which the lab's visual and linguistic words are probed; for the lab's parts."""
    maps: int = Field(default=3, ge=0)
    """Samples of stages 2 and 3 whose tokens' relevance is kept at up to five steps, for the report. 0: none."""

    @field_validator("benchmarks", mode="before")
    @classmethod
    def _expand(cls, value: Any) -> Any:
        value = value.split(",") if isinstance(value, str) else value  # evaluate.benchmarks=paper
        if isinstance(value, list | tuple) and all(isinstance(name, str) for name in value):
            return expand_names(value)
        return value

    @model_validator(mode="after")
    def _probe_of_what(self) -> Self:
        if self.after_pretrain == "probe" and not self.probe_steps:
            raise ValueError("after_pretrain: probe measures what probe_steps names; give steps, such as [100, 600]")
        return self

    @field_validator("devices")
    @classmethod
    def _at_least_one(cls, value: int | str) -> int | str:
        if value != "auto" and int(value) < 1:
            raise ValueError("devices must be auto or at least 1")
        return value
