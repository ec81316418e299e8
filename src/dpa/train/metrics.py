"""metrics.jsonl: one line per optimizer step, none twice and none missing, whenever the process was killed; and one per
evaluation in between, with a ``kind``.

The file is only ever appended to. A saved state remembers how many bytes there were and their digest; a continued run
cuts the file there first, a half-written last line included.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpa.errors import StorageError
from dpa.log import get_logger
from dpa.objectives import weight_health
from dpa.train.step import StepOutput
from dpa.types import Batch

log = get_logger(__name__)

TIMING_FIELDS = ("seconds", "data_wait_share", "tokens_per_second")
"""Fields that differ from run to run; all others of a continued run equal an uninterrupted one's (CPU: bit for bit)."""

EVALUATION = "evaluation"
"""``kind`` of a line that is no optimizer step: ``step``, ``stage``, ``benchmarks`` (name -> figures), ``seconds``."""

_WEIGHT_SUMS = ("tokens", "weight", "weight_squared", "at_minimum", "at_maximum", "text_only")
_SUMS = ("loss", "divisor", *_WEIGHT_SUMS, "nll", "image_weight", "image_tokens")
_COUNTS = ("samples", "sequence_tokens")


class StepSums:
    """Running sums of one optimizer step on one rank, on the device: nothing here waits for it."""

    def __init__(self, device: torch.device) -> None:
        # counts of a large step are exact in float64 only; MPS has none
        self._dtype = torch.float32 if device.type == "mps" else torch.float64
        self._sums = torch.zeros(len(_SUMS), dtype=self._dtype, device=device)
        self._counts = [0, 0]

    def add(self, output: StepOutput, batch: Batch) -> None:
        """Adds a micro-batch.

        Args:
            output: the step module's.
            batch: as the loader gave it, still on the CPU. Rows without a label (fillers) do not count as samples.
        """
        values = {"loss": output.loss_sum.detach(), "divisor": output.weight_sum, **output.stats}
        self._sums += torch.stack([values[name].to(self._dtype) for name in _SUMS])
        rows = batch.supervised.any(dim=1)
        self._counts[0] += int(rows.sum())
        self._counts[1] += int(batch.attention_mask[rows].sum())

    def image_share(self) -> Tensor:
        """[2]: sum of weights and number of image samples' tokens so far."""
        place = _SUMS.index("image_weight")
        return self._sums[place : place + 2].clone()

    def tensor(self) -> Tensor:
        """All sums, to be added over ranks and read with :func:`totals`."""
        return torch.cat([self._sums, torch.tensor(self._counts, dtype=self._dtype, device=self._sums.device)])


def totals(summed: Tensor) -> dict[str, float]:
    """Names -> totals over ranks; waits for the device."""
    return dict(zip((*_SUMS, *_COUNTS), summed.tolist(), strict=True))


def step_row(
    *,
    stage: str,
    step: int,
    total: Mapping[str, float],
    lr: float,
    grad_norm: float | None,
    seconds: float,
    waited: float,
) -> dict[str, Any]:
    """One line of metrics.jsonl.

    Args:
        stage: its name.
        step: optimizer steps done, from 1.
        total: from :func:`totals`.
        lr: the learning rate of this step.
        grad_norm: before clipping; None where the step was skipped because nothing had weight.
        seconds: wall time of the step.
        waited: of which for data, on this rank.

    Returns:
        ``loss``: weighted mean, nats per token (``official``: mean of the micro-batches' means); None if skipped.
        ``nll``: unweighted mean, nats per token, comparable between objectives. ``tokens``: supervised;
        ``sequence_tokens``: all but padding. Weight health: see ``objectives.weight_health``.
    """
    tokens, divisor = total["tokens"], total["divisor"]
    return {
        "step": step,
        "stage": stage,
        "loss": total["loss"] / divisor if divisor > 0 else None,
        "nll": total["nll"] / tokens if tokens > 0 else None,
        "lr": lr,
        "grad_norm": grad_norm,
        "skipped": divisor <= 0,
        "samples": int(total["samples"]),
        "tokens": int(tokens),
        "sequence_tokens": int(total["sequence_tokens"]),
        **weight_health({name: total[name] for name in _WEIGHT_SUMS}),
        "seconds": round(seconds, 6),
        "data_wait_share": round(waited / seconds, 4) if seconds > 0 else 0.0,
        "tokens_per_second": round(total["sequence_tokens"] / seconds, 1) if seconds > 0 else 0.0,
    }


@dataclass(frozen=True, slots=True)
class Position:
    """Where a state was saved."""

    bytes: int
    sha256: str
    """Hex, of those bytes."""


START = Position(bytes=0, sha256=hashlib.sha256().hexdigest())
"""An empty file."""


class MetricsFile:
    """The writer, on rank 0.

    A full disk does not end the training: lines wait in memory until there is room again.
    """

    def __init__(self, path: Path) -> None:
        """Opens the file, without changing it.

        Raises:
            StorageError: it cannot be opened for writing.
        """
        self.path = path
        try:
            self._file = open(path, "a+b", buffering=0)  # noqa: SIM115 - closed by close()
        except OSError as error:
            raise StorageError(f"{path}: cannot be written ({error.strerror}); mend that and start again") from None
        self._hash = hashlib.sha256()
        self._size = 0
        self._waiting = b""

    def holds(self, position: Position) -> bool:
        """The file still begins with what it held at ``position``."""
        return hashlib.sha256(self._head(position.bytes)).hexdigest() == position.sha256

    def cut(self, position: Position) -> None:
        """Goes on from ``position``, which the file must hold; whatever was written later is dropped."""
        head = self._head(position.bytes)
        assert hashlib.sha256(head).hexdigest() == position.sha256
        os.ftruncate(self._file.fileno(), position.bytes)
        self._hash = hashlib.sha256(head)
        self._size = position.bytes
        self._waiting = b""

    def write(self, row: Mapping[str, Any]) -> None:
        """Appends a line."""
        line = json.dumps(row, separators=(",", ":"), allow_nan=False).encode() + b"\n"
        told = bool(self._waiting)
        self._waiting += line
        self._hash.update(line)
        try:
            self._flush()
        except OSError as error:
            if not told:
                log.warning("%s: %s; its lines wait in memory until there is room again", self.path, error.strerror)

    def position(self) -> Position:
        """Makes all lines durable and says where the file stands.

        Raises:
            OSError: lines cannot be written.
        """
        self._flush()
        os.fsync(self._file.fileno())
        return Position(bytes=self._size, sha256=self._hash.hexdigest())

    def close(self) -> None:
        """Ends the file.

        Raises:
            StorageError: lines are still waiting for room.
        """
        try:
            self._flush()
        except OSError as error:
            raise StorageError(
                f"{self.path}: {error.strerror}; free space, then start the same command again: "
                "it continues from the last saved state"
            ) from None
        finally:
            self._file.close()

    def _head(self, size: int) -> bytes:
        return os.pread(self._file.fileno(), size, 0)

    def _flush(self) -> None:
        try:
            written = 0
            while written < len(self._waiting):
                written += os.write(self._file.fileno(), self._waiting[written:])
        except OSError:
            os.ftruncate(self._file.fileno(), self._size)  # no half lines
            raise
        self._size += written
        self._waiting = b""


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl that are optimizer steps: those without a ``kind``."""
    with open(path, "rb") as file:
        return [row for line in file if "kind" not in (row := json.loads(line))]


def first_and_last(rows: Sequence[Mapping[str, Any]], name: str = "loss") -> tuple[float, float]:
    """Means over the first and the last twentieth of the rows (at least one), which say more than two single steps."""
    values = [float(row[name]) for row in rows if row[name] is not None]
    if not values:
        return float("nan"), float("nan")
    width = max(1, len(values) // 20)
    return sum(values[:width]) / width, sum(values[-width:]) / width
