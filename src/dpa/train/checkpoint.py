"""Saved states of a stage in progress: written whole or not at all, checked before they are used.

``state-STEP/`` holds ``tensors.safetensors`` (trained parameters, optimizer moments, generators), ``state.json`` (all
else) and ``digests.json`` over both. No pickle anywhere.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dpa.errors import CheckpointError
from dpa.log import get_logger
from dpa.store import fsync_folder, write_json

log = get_logger(__name__)

FORMAT = 1
_TENSORS, _JSON, _DIGESTS = "tensors.safetensors", "state.json", "digests.json"
_NAME = re.compile(r"state-(\d{8,})")


@dataclass(frozen=True, slots=True)
class SavedState:
    """What a state holds."""

    step: int
    """Optimizer steps done."""
    tensors: dict[str, Tensor]
    """On the CPU."""
    values: dict[str, Any]
    """JSON-able."""
    path: Path


class StateStore:
    """The states of one stage, in one folder. Rank 0 writes; every rank may read."""

    def __init__(self, folder: Path, *, fingerprint: str, keep: int) -> None:
        """
        Args:
            folder: is made when the first state is saved.
            fingerprint: of everything that the stage's result depends on; states of another one are refused.
            keep: how many states stay.
        """
        self._folder = folder
        self._fingerprint = fingerprint
        self._keep = keep

    def save(self, step: int, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> bool:
        """Writes a state and removes the oldest ones.

        A disk that is full or fails costs this state, not the training: what was saved before stays and is named in a
        warning.

        Returns:
            Whether the state was saved.
        """
        final = self._folder / f"state-{step:08d}"
        unfinished = final.with_name(final.name + ".tmp")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._write(unfinished, step, tensors, values)
            if final.exists():
                shutil.rmtree(final)
            os.replace(unfinished, final)
            fsync_folder(self._folder)
        except OSError as error:
            shutil.rmtree(unfinished, ignore_errors=True)
            before = self.newest()
            log.warning(
                "step %d: the state could not be saved (%s: %s); training goes on, a restart would continue from %s",
                step,
                final,
                error.strerror or error,
                "the beginning" if before is None else before,
            )
            return False
        self._prune()
        return True

    def newest(self) -> Path | None:
        """The newest state's folder, unchecked."""
        return next((path for _, path in self._states()), None)

    def load(self, usable: Callable[[SavedState], bool] = lambda _: True) -> SavedState | None:
        """The newest state that is whole and ``usable``; None: start from the beginning.

        Others are set aside under another name, with a message. Rank 0 only.

        Raises:
            CheckpointError: a whole state belongs to another job.
        """
        for step, path in self._states():
            problem = _problem(path)
            state = None if problem else self._read(step, path)
            if state is not None and usable(state):
                return state
            self._set_aside(path, problem or "the metrics file is not the one that it was saved with")
        return None

    def read(self, step: int) -> SavedState:
        """A state that :meth:`load` found, on another rank."""
        return self._read(step, self._folder / f"state-{step:08d}")

    def _read(self, step: int, path: Path) -> SavedState:
        content = json.loads((path / _JSON).read_text(encoding="utf-8"))
        if content["fingerprint"] != self._fingerprint or content["format"] != FORMAT:
            raise CheckpointError(
                f"{path} was saved by another job (fingerprint {content['fingerprint'][:12]}, format "
                f"{content['format']}; this one has {self._fingerprint[:12]}, {FORMAT}): remove {self._folder} "
                "to start this stage from the beginning"
            )
        return SavedState(step=step, tensors=load_file(path / _TENSORS), values=content["values"], path=path)

    def _write(self, folder: Path, step: int, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        with _as_os_error(folder):
            save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, folder / _TENSORS)
        _fsync(folder / _TENSORS)
        content = {"format": FORMAT, "fingerprint": self._fingerprint, "step": step, "values": dict(values)}
        write_json(folder / _JSON, content)
        write_json(folder / _DIGESTS, _digests(folder))
        fsync_folder(folder)

    def _states(self) -> Iterator[tuple[int, Path]]:
        """(step, folder), newest first."""
        if not self._folder.is_dir():
            return
        found = [(_NAME.fullmatch(path.name), path) for path in self._folder.iterdir() if path.is_dir()]
        yield from sorted(((int(match[1]), path) for match, path in found if match), reverse=True)

    def _prune(self) -> None:
        for _, path in list(self._states())[self._keep :]:
            shutil.rmtree(path, ignore_errors=True)
        for path in self._folder.glob("state-*.tmp"):
            shutil.rmtree(path, ignore_errors=True)

    def _set_aside(self, path: Path, problem: str) -> None:
        aside = path.with_name(path.name + ".broken")
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(path, aside)
        before = self.newest()
        log.warning(
            "%s cannot be used (%s) and was set aside as %s; continuing from %s",
            path,
            problem,
            aside.name,
            "the beginning" if before is None else before.name,
        )


def _problem(path: Path) -> str | None:
    """What is wrong with a state; None: nothing."""
    try:
        noted = json.loads((path / _DIGESTS).read_text(encoding="utf-8"))
        found = _digests(path)
    except (OSError, ValueError) as error:
        return f"unreadable: {error}"
    wrong = sorted(name for name in found if noted.get(name) != found[name]) if isinstance(noted, dict) else [_DIGESTS]
    return f"{', '.join(wrong)}: content differs from what was written" if wrong else None


def _digests(folder: Path) -> dict[str, str]:
    digests = {}
    for name in (_TENSORS, _JSON):
        with open(folder / name, "rb") as file:
            digests[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def _fsync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


@contextmanager
def _as_os_error(path: Path) -> Iterator[None]:
    """safetensors wraps what the system said into its own error's text."""
    try:
        yield
    except SafetensorError as error:
        said = re.search(r"os error (\d+)", str(error))
        if said is None:
            raise
        number = int(said[1])
        raise OSError(number, os.strerror(number), str(path)) from None
