"""Predictions on disk: append-only JSONL keyed by id, from which a killed evaluation continues.

A line says what was asked, and of which model, as digests. Lines of another model, other generation settings, another
question text or other pixels are dropped, so a file that lies in a run's folder from an earlier recipe is harmless.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from dpa.log import get_logger
from dpa.store import disk_errors, write_text

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Prediction:
    """A model's answer to one question."""

    id: str
    prediction: str
    """Decoded new tokens without special ones, stripped. Empty only where the model ended its turn at once."""
    tokens: int
    """New tokens, the end of turn included."""
    finished: bool
    """The model ended its turn; False: it was cut at ``max_new_tokens``."""


class PredictionFile:
    """One JSONL file of predictions; use it as a context manager.

    Args:
        path: made with its folders where it is missing.
        run: digest of model and generation settings; ``asked`` digests tell the questions apart.

    Raises:
        StorageError: the disk is full or not writable (from every method).
    """

    def __init__(self, path: Path, run: str) -> None:
        self._path = path
        self._run = run
        self._file: IO[str] | None = None

    def __enter__(self) -> PredictionFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def restore(self, asked: Mapping[str, str]) -> dict[str, Prediction]:
        """What an earlier start has answered already.

        Drops everything else but answers of the same run to questions that are not asked now (another ``limit``).

        Args:
            asked: question id -> digest of what is asked.

        Returns:
            id -> prediction, for ids in ``asked``.
        """
        if not self._path.is_file():
            return {}
        text = self._path.read_bytes().decode("utf-8", errors="replace")
        # not splitlines: answers may hold U+2028
        records = [(line, record) for line in text.split("\n") if (record := _parse(line)) is not None]
        kept = [
            (line, record)
            for line, record in records
            if record["run"] == self._run and asked.get(record["id"], record["asked"]) == record["asked"]
        ]
        if len(kept) < len(records):
            log.info(
                "%s: %d of %d predictions are of another model or question; asked again",
                self._path,
                len(records) - len(kept),
                len(records),
            )
        mended = "".join(line + "\n" for line, _ in kept)
        if mended != text:
            with disk_errors(self._path):
                write_text(self._path, mended)
        return {record["id"]: _prediction(record) for _, record in kept if record["id"] in asked}

    def append(self, predictions: Iterable[Prediction], asked: Mapping[str, str]) -> None:
        """Adds lines and hands them to the system, so that a kill after this call loses none of them."""
        lines = [
            json.dumps({**asdict(item), "run": self._run, "asked": asked[item.id]}, ensure_ascii=False)
            for item in predictions
        ]
        with disk_errors(self._path):
            if self._file is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._file = open(self._path, "a", encoding="utf-8", newline="\n")  # noqa: SIM115 (__exit__ closes it)
            self._file.write("".join(line + "\n" for line in lines))
            self._file.flush()


def _parse(line: str) -> dict[str, Any] | None:
    """The record of a line; None for half a line, cut when the process died, or what a crash of the machine left."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    fields = {"id": str, "prediction": str, "tokens": int, "finished": bool, "run": str, "asked": str}
    fits = isinstance(record, dict) and all(isinstance(record.get(name), kind) for name, kind in fields.items())
    return record if fits else None


def _prediction(record: Mapping[str, Any]) -> Prediction:
    return Prediction(
        id=record["id"],
        prediction=record["prediction"],
        tokens=record["tokens"],
        finished=record["finished"],
    )
