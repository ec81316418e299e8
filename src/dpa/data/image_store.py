"""From an image's name in a sample to its bytes: a file below a folder, or a value in a table.

Names are relative paths; ``embedded:FILE/ROW/PLACE`` (numbers from 0) is an image that lies in the source's tables.
"""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from PIL import Image

from dpa.data.images import MENDING, ImageTransform, decode_image, load_image, safe_join
from dpa.data.tables import TableImages
from dpa.errors import DataError

URLS: Final = "urls.jsonl"
_EMBEDDED = re.compile(r"embedded:(\d+)/(\d+)/(\d+)")


def embedded_name(file: int, row: int, place: int) -> str:
    """The name of an image in a table; numbers from 0."""
    return f"embedded:{file}/{row}/{place}"


@dataclass(frozen=True, slots=True)
class Place:
    """Where an image lies."""

    label: str
    """For messages, and unique: the absolute path; for an image in a table, the table's path, row and place."""
    path: Path
    """The file that holds it: itself, or its table."""
    inside: tuple[int, int, int] | None = None
    """File, row and place in the tables."""


class ImageStore:
    """The images of one source. Picklable; threads may share it."""

    def __init__(self, folders: Mapping[str, Path], tables: TableImages | None = None) -> None:
        """
        Args:
            folders: first part(s) of a path -> folder that stands for it; ``""`` takes the rest.
            tables: of a source that holds images itself.
        """
        # the longest first
        self._folders = sorted(folders.items(), key=lambda item: len(item[0]), reverse=True)
        self.tables = tables

    @property
    def folders(self) -> dict[str, Path]:
        """As given."""
        return dict(self._folders)

    def is_embedded(self, name: str) -> bool:
        """The image lies in a table."""
        return self.tables is not None and _EMBEDDED.fullmatch(name) is not None

    def place(self, name: str) -> Place:
        """Where an image is to be found; asks the disk for nothing.

        Raises:
            DataError: the name leaves its folder, or begins with none of the prefixes.
        """
        if self.tables is not None and (match := _EMBEDDED.fullmatch(name)):
            file, row, place = map(int, match.groups())
            path = self.tables.paths[file]
            return Place(f"{os.path.abspath(path)}, row {row + 1}, image {place + 1}", path, (file, row, place))
        path = self._file(name)
        return Place(os.path.abspath(path), path)

    def content(self, place: Place) -> bytes:
        """The bytes of an image in a table.

        Raises:
            DataError: they are missing.
            OSError: the file that they lie in cannot be read.
        """
        assert self.tables is not None
        assert place.inside is not None
        content, path = self.tables.read(*place.inside)
        if content is not None:
            return content
        if path:
            file = self._file(path)
            if not file.is_file():
                raise DataError(f"image missing: {file} does not exist ({place.label}); {MENDING}")
            return file.read_bytes()
        raise DataError(f"image missing: {place.label} has neither bytes nor path; {MENDING}")

    def load(self, name: str, *, max_pixels: int, reduce_to: ImageTransform | None = None) -> Image.Image:
        """See :func:`dpa.data.images.load_image`.

        Raises:
            DataError: missing, not an image, truncated, damaged or too large.
        """
        place = self.place(name)
        if place.inside is None:
            return load_image(place.path, max_pixels=max_pixels, reduce_to=reduce_to)
        try:
            file = io.BytesIO(self.content(place))
        except OSError as error:
            raise DataError(f"image unreadable: {place.label}: {error.strerror or error}; {MENDING}") from None
        return decode_image(file, name=place.label, max_pixels=max_pixels, reduce_to=reduce_to)

    def _file(self, name: str) -> Path:
        for prefix, folder in self._folders:
            if not prefix:
                return safe_join(folder, name)
            if name.startswith(f"{prefix}/"):
                return safe_join(folder, name[len(prefix) + 1 :])
        known = ", ".join(prefix for prefix, _ in self._folders)
        raise DataError(f"image path refused: {name!r} begins with none of {known}; add its first part to `images`")


def read_urls(path: Path) -> dict[str, str]:
    """A PixMo folder's ``urls.jsonl``: ``{"url": "https://...", "file": "a/b.jpg"}`` a line -> url: file.

    Raises:
        DataError: a line is something else.
    """
    found: dict[str, str] = {}
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
                found[str(value["url"])] = str(value["file"])
            except (ValueError, KeyError, TypeError):
                raise DataError(f"{path}, line {number}: expected an object with 'url' and 'file', in UTF-8") from None
    return found
