"""Saved states of a stage in progress: written whole or not at all, checked before they are used.

``state-STEP/`` holds ``tensors.safetensors`` (trained parameters, optimizer moments, generators), ``state.json`` (all
else) and ``digests.json`` over both. Where ranks have shards, each writes its own into a further file
(``shard_files.py``). No pickle anywhere.
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

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dpa.errors import CheckpointError
from dpa.log import get_logger
from dpa.store import fsync_folder, write_json

log = get_logger(__name__)

FORMAT = 2
_TENSORS, _JSON, _DIGESTS = "tensors.safetensors", "state.json", "digests.json"
SHARDS = "shard-*.safetensors"
"""Pattern of the names that torch gives to the ranks' own files."""
_NAME = re.compile(r"state-(\d{8,})")


@dataclass(frozen=True, slots=True)
class SavedState:
    """What a state holds."""

    step: int
    """Optimizer steps done."""
    values: dict[str, Any]
    """JSON-able."""
    path: Path

    @property
    def is_sharded(self) -> bool:
        """Some tensors lie in shards, in files of their own."""
        return any(self.path.glob(SHARDS))

    @contextmanager
    def tensors(self) -> Iterator[Callable[[str], Tensor]]:
        """Name -> tensor on the CPU, read when asked for; shards are not among them."""
        with safe_open(self.path / _TENSORS, framework="pt") as file:
            yield file.get_tensor

    @property
    def names(self) -> list[str]:
        """What :meth:`tensors` knows."""
        with safe_open(self.path / _TENSORS, framework="pt") as file:
            return list(file.keys())


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
        return self.begin(step) is not None and self.finish(step, tensors, values)

    def begin(self, step: int) -> Path | None:
        """A folder for the shards of a state; None, with a warning: there cannot be one."""
        unfinished = self._unfinished(step)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
        except OSError as error:
            self.give_up(step, error.strerror or str(error))
            return None
        return unfinished

    def finish(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        values: Mapping[str, Any],
        shards: Mapping[str, str] | None = None,
    ) -> bool:
        """Completes and publishes what :meth:`begin` began.

        Args:
            shards: file name -> sha256 of what other ranks have written into the folder.
        """
        unfinished = self._unfinished(step)
        final = unfinished.with_suffix("")
        try:
            self._write(unfinished, step, tensors, values, shards or {})
            if final.exists():
                shutil.rmtree(final)
            os.replace(unfinished, final)
            fsync_folder(self._folder)
        except OSError as error:
            self.give_up(step, error.strerror or str(error))
            return False
        self._prune()
        return True

    def give_up(self, step: int, problem: str) -> None:
        """Removes an unfinished state and says so."""
        unfinished = self._unfinished(step)
        shutil.rmtree(unfinished, ignore_errors=True)
        before = self.newest()
        log.warning(
            "step %d: the state could not be saved (%s: %s); training goes on, a restart would continue from %s",
            step,
            unfinished.with_suffix(""),
            problem,
            "the beginning" if before is None else before,
        )

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
        return SavedState(step=step, values=content["values"], path=path)

    def _unfinished(self, step: int) -> Path:
        return self._folder / f"state-{step:08d}.tmp"

    def _write(
        self,
        folder: Path,
        step: int,
        tensors: Mapping[str, Tensor],
        values: Mapping[str, Any],
        shards: Mapping[str, str],
    ) -> None:
        with _as_os_error(folder):
            save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, folder / _TENSORS)
        _fsync(folder / _TENSORS)
        content = {"format": FORMAT, "fingerprint": self._fingerprint, "step": step, "values": dict(values)}
        write_json(folder / _JSON, content)
        own = {name: file_digest(folder / name) for name in (_TENSORS, _JSON)}
        write_json(folder / _DIGESTS, own | dict(shards))
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
        names = {_TENSORS, _JSON, *(file.name for file in path.glob(SHARDS))}
        found = {name: file_digest(path / name) for name in names}
    except (OSError, ValueError) as error:
        return f"unreadable: {error}"
    if not isinstance(noted, dict):
        noted = {}
    wrong = sorted(name for name in found | noted if noted.get(name) != found.get(name))
    return f"{', '.join(wrong)}: content differs from what was written" if wrong else None


def file_digest(path: Path) -> str:
    """sha256 (hex) of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
