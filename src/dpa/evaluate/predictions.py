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
from typing import IO, Any, ClassVar, Generic, Protocol, Self, TypeVar

from dpa.log import get_logger
from dpa.store import disk_errors, write_text

log = get_logger(__name__)


class Record(Protocol):
    """What a line says about one question; a dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def id(self) -> str:
        """The question's."""

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Self | None:
        """From a line's object; None: it is no such record."""


R = TypeVar("R", bound=Record)


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

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Prediction | None:
        """See :class:`Record`."""
        fields = {"id": str, "prediction": str, "tokens": int, "finished": bool}
        fits = all(isinstance(record.get(name), kind) for name, kind in fields.items())
        return cls(**{name: record[name] for name in fields}) if fits else None


def folder_for(checkpoint: str) -> Path:
    """Where an evaluation's files go unless told: ``CHECKPOINT.eval`` beside a folder, ``eval/ID`` for a hub id."""
    folder = Path(checkpoint)
    if folder.name in ("", ".."):
        folder = folder.resolve()  # "." has no name
    # the name as given: in a run's folder the checkpoint is a link into the store
    return Path(f"{folder}.eval") if folder.is_dir() else Path("eval", checkpoint.replace("/", "--"))


@dataclass(frozen=True, slots=True)
class _Line(Generic[R]):
    text: str
    record: R
    run: str
    asked: str


class PredictionFile(Generic[R]):
    """One JSONL file of predictions; use it as a context manager.

    Args:
        path: made with its folders where it is missing.
        run: digest of model and generation settings; ``asked`` digests tell the questions apart.
        kind: what a line holds besides those digests.

    Raises:
        StorageError, UserError: the disk is full or not writable (from every method).
    """

    def __init__(self, path: Path, run: str, kind: type[R]) -> None:
        self._path = path
        self._run = run
        self._kind = kind
        self._file: IO[str] | None = None

    def __enter__(self) -> PredictionFile[R]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def restore(self, asked: Mapping[str, str]) -> dict[str, R]:
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
        lines = [_Line(line, *found) for line in text.split("\n") if (found := self._parse(line)) is not None]
        kept = [line for line in lines if line.run == self._run and asked.get(line.record.id, line.asked) == line.asked]
        if len(kept) < len(lines):
            log.info(
                "%s: %d of %d predictions are of another model or question; asked again",
                self._path,
                len(lines) - len(kept),
                len(lines),
            )
        mended = "".join(line.text + "\n" for line in kept)
        if mended != text:
            with disk_errors(self._path):
                write_text(self._path, mended)
        return {line.record.id: line.record for line in kept if line.record.id in asked}

    def _parse(self, line: str) -> tuple[R, str, str] | None:
        """Record, run, asked; None for half a line, cut when the process died, or what a crash of the machine left."""
        try:
            found = json.loads(line)
        except ValueError:
            return None
        if not isinstance(found, dict) or not all(isinstance(found.get(name), str) for name in ("run", "asked")):
            return None
        record = self._kind.from_record(found)
        return None if record is None else (record, found["run"], found["asked"])

    def append(self, predictions: Iterable[R], asked: Mapping[str, str]) -> None:
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
