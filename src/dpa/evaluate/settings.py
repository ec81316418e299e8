"""Settings of the evaluation that a run ends with."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

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
    after_pretrain: bool = False
    """Also after stage 2: the original LLM with the connector, before it is taught to answer."""
    probe_steps: tuple[int, ...] = ()
    """Steps of stage 2 after which the lab's visual and linguistic words are probed; for the lab's parts."""
