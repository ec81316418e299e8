"""Any source to the project's own form, LLaVA ``.jsonl`` and image files; and its captions alone, for stage 1."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, TextIO

from dpa.data.formats import Row
from dpa.data.image_store import ImageStore
from dpa.data.samples import IMAGE_MARKER, Role
from dpa.data.settings import DataSource
from dpa.data.sources import open_source
from dpa.errors import DataError, UserError
from dpa.store import disk_errors

DATA_FILE: Final = "data.jsonl"
IMAGE_FOLDER: Final = "images"
_FROM: dict[Role, str] = {"system": "system", "user": "human", "assistant": "gpt"}
_SHOWN = 5
_SIGNATURES = (
    (b"\xff\xd8\xff", ".jpg"),
    (b"\x89PNG", ".png"),
    (b"GIF8", ".gif"),
    (b"BM", ".bmp"),
    (b"II*\0", ".tif"),
    (b"MM\0*", ".tif"),
)
"""First bytes -> extension; WebP is looked at apart."""


@dataclass(frozen=True, slots=True)
class Converted:
    """What was written."""

    file: str
    images: str | dict[str, str]
    """What a recipe's ``images`` must be."""
    samples: int
    left_out: int
    """Samples whose image could not be read, or that have no caption."""
    left_out_first: tuple[str, ...]
    images_written: int
    """Files written now; what an earlier, interrupted call wrote is not written again."""

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return asdict(self)

    def text(self) -> str:
        """For people."""
        lines = [f"{self.file}: {self.samples:,} samples, {self.images_written:,} images written"]
        if self.left_out:
            lines.append(f"left out: {self.left_out:,}")
            lines += [f"  {reason}" for reason in self.left_out_first]
        return "\n".join([*lines, f"in a recipe: {{path: {self.file}, images: {json.dumps(self.images)}}}"])


def convert(
    source: DataSource, out: Path, *, copy: bool = False, progress: Callable[[int], Any] | None = None
) -> Converted:
    """Writes ``out/data.jsonl``, and images where the source holds them itself.

    Images that are files stay where they are, and their paths as they are. Images inside tables are written to
    ``out/images/ab/DIGEST.jpg``, named after their content, so that equal ones are written once.

    Args:
        source: ``limit`` and ``weight`` play no part.
        out: folder to write.
        copy: write images that are files, too, so that the folder is complete.
        progress: called with the number of samples done.

    Raises:
        UserError: the folder holds a converted file already, or is a file.
        DataError: the source cannot be read, or no sample is left.
        StorageError, UserError: the disk is full or not writable.
    """
    opened = open_source(source)
    target = out / DATA_FILE
    if target.exists():
        raise UserError(f"{target} exists; remove it, or name another folder")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; name a folder to write")
    writer = _Images(opened.store, out)
    embedded = copy or opened.store.tables is not None
    problems = _Problems()
    samples = 0
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        with _whole_file(target) as file:
            for done, row in enumerate(opened.rows(), 1):
                try:
                    names = [writer.write(name) for name in row.images] if embedded else list(row.images)
                except DataError as error:
                    problems.add(f"sample {row.id!r} ({opened.files.paths[row.file]}, row {row.number}): {error}")
                else:
                    file.write(json.dumps(_llava(row, names), ensure_ascii=False) + "\n")
                    samples += 1
                if progress is not None:
                    progress(done)
            if not samples:
                raise DataError(f"{source.path}: no sample could be converted: {'; '.join(problems.first)}")
    folders = {prefix: str(folder) for prefix, folder in opened.store.folders.items()}
    images: str | dict[str, str] = folders[""] if list(folders) == [""] else folders
    return Converted(
        str(target), str(out) if embedded else images, samples, problems.count, tuple(problems.first), writer.written
    )


def write_captions(source: DataSource, out: Path, *, progress: Callable[[int], Any] | None = None) -> Converted:
    """The text-only caption file of stage 1: a JSON list of conversations without image (``*_text_only.json``).

    Rows are ``{"id", "conversations": [human, gpt]}``: no ``image``, two turns, no marker; the first one's text is
    what the source asks, and stage 1 drops it. (The reference's ``train.py`` opens an image for any row with that key,
    and asserts two turns.)

    Args:
        source: captions: one answer a sample; others are left out and counted.
        out: file to write, ``.json``.
        progress: called with the number of samples done.

    Raises:
        UserError: the name is not ``.json``, or the source's own, or a folder's.
        DataError: the source cannot be read, or has no caption.
        StorageError, UserError: the disk is full or not writable.
    """
    if out.suffix.lower() != ".json":
        raise UserError(f"{out}: the captions are one JSON list; name the file .json")
    opened = open_source(source)
    if out.exists() and any(out.samefile(path) for path in opened.files.paths):
        raise UserError(f"{out} is the source itself, which would lose its images; name another file")
    problems = _Problems()
    samples = 0
    with disk_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        with _whole_file(out) as file:
            file.write("[")
            for done, row in enumerate(opened.rows(), 1):
                answers = [turn.text for turn in row.turns if turn.role == "assistant"]
                if len(answers) == 1 and answers[0].strip():
                    asked = next((turn.text for turn in row.turns if turn.role == "user"), "")
                    turns = [
                        {"from": "human", "value": asked.replace(IMAGE_MARKER, "").strip()},
                        {"from": "gpt", "value": answers[0]},
                    ]
                    value = {"id": row.id, "conversations": turns}
                    file.write((",\n" if samples else "\n") + json.dumps(value, ensure_ascii=False))
                    samples += 1
                else:
                    problems.add(f"sample {row.id!r}: {len(answers)} answers, a caption has one that is not empty")
                if progress is not None:
                    progress(done)
            file.write("\n]\n")
            if not samples:
                raise DataError(f"{source.path}: no caption: {'; '.join(problems.first)}")
    return Converted(str(out), str(out.parent), samples, problems.count, tuple(problems.first), 0)


class _Problems:
    def __init__(self) -> None:
        self.count = 0
        self.first: list[str] = []

    def add(self, reason: str) -> None:
        self.count += 1
        if len(self.first) < _SHOWN:
            self.first.append(reason)


class _Images:
    """Writes images under the digest of their content."""

    def __init__(self, store: ImageStore, out: Path) -> None:
        self._store = store
        self._out = out
        self.written = 0

    def write(self, name: str) -> str:
        """The image's path relative to ``out``.

        Raises:
            DataError: it cannot be read.
        """
        place = self._store.place(name)
        try:
            content = place.path.read_bytes() if place.inside is None else self._store.content(place)
        except OSError as error:
            raise DataError(f"image unreadable: {place.label}: {error.strerror or error}") from None
        digest = hashlib.blake2b(content, digest_size=16).hexdigest()
        relative = f"{IMAGE_FOLDER}/{digest[:2]}/{digest}{_extension(content)}"
        target = self._out / relative
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = target.with_name(f"{target.name}.tmp")
            temporary.write_bytes(content)
            os.replace(temporary, target)
            self.written += 1
        return relative


def _extension(content: bytes) -> str:
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return ".webp"
    return next((extension for signature, extension in _SIGNATURES if content.startswith(signature)), "")


def _llava(row: Row, images: list[str]) -> dict[str, Any]:
    image = {} if not images else {"image": images[0] if len(images) == 1 else images}
    turns = [{"from": _FROM[turn.role], "value": turn.text} for turn in row.turns]
    marks = {} if row.visual_spans is None else {"visual_spans": row.visual_spans}
    return {"id": row.id, **image, "conversations": turns, **marks}


@contextmanager
def _whole_file(path: Path) -> Iterator[TextIO]:
    """A text file that appears when it is complete."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
