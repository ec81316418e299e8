"""Images of benchmark rows, wherever they lie. A handle is small; pixels are read when it is opened."""

from __future__ import annotations

import ast
import base64
import binascii
import hashlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from PIL import Image

from dpa.data.images import decode_image, load_image, safe_join
from dpa.data.settings import DataSettings
from dpa.data.tables import TableImages
from dpa.errors import DataError
from dpa.evaluate.data.tsv import read_cell

MAX_IMAGE_PIXELS: int = DataSettings.model_fields["max_image_pixels"].default
"""Larger images are refused before they are decoded, in evaluation as in training."""


class ImageSource(Protocol):
    """One image of one row."""

    def open(self) -> Image.Image:
        """Upright 8-bit RGB.

        Raises:
            DataError: missing, not an image, damaged, or larger than :data:`MAX_IMAGE_PIXELS`.
        """

    def digest(self) -> str:
        """Of the bytes as they lie in the file: another picture, another digest."""


@dataclass(frozen=True, slots=True)
class FileImage:
    """A file of its own."""

    path: Path

    def open(self) -> Image.Image:
        """See :class:`ImageSource`."""
        return load_image(self.path, max_pixels=MAX_IMAGE_PIXELS)

    def digest(self) -> str:
        """See :class:`ImageSource`.

        Raises:
            DataError: the file cannot be read.
        """
        try:
            with open(self.path, "rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise DataError(f"{self.path} cannot be read ({error.strerror or error})") from None


@dataclass(frozen=True, slots=True)
class CellImage:
    """Base64 in a cell of a TSV; opening it reads that row again, and no other."""

    path: Path
    start: int
    """Byte where the row begins."""
    length: int
    """Bytes of the row."""
    column: int
    place: int | None
    """Which of the cell's list; None: the cell is one image."""
    cell_digest: str
    """Known since the index was read."""
    where: str
    """File and line, for messages."""

    def open(self) -> Image.Image:
        """See :class:`ImageSource`."""
        cell = read_cell(self.path, self.start, self.length, self.column)
        try:
            text = cell if self.place is None else str(ast.literal_eval(cell)[self.place])
            data = base64.b64decode(text, validate=False)
        except (ValueError, SyntaxError, IndexError, binascii.Error) as error:
            raise DataError(f"{self.where}: the image is not base64 ({error}); download the file again") from None
        return decode_image(io.BytesIO(data), name=f"the image of {self.where}", max_pixels=MAX_IMAGE_PIXELS)

    def digest(self) -> str:
        """See :class:`ImageSource`."""
        return self.cell_digest if self.place is None else f"{self.cell_digest}-{self.place}"


@dataclass(frozen=True, slots=True)
class TableImage:
    """An image struct (bytes, or a path below the table's folder) of a parquet or Arrow row."""

    images: TableImages
    file: int
    row: int
    """From 0."""
    where: str

    def open(self) -> Image.Image:
        """See :class:`ImageSource`."""
        data, path = self._content()
        if data is None:
            assert path is not None
            return load_image(path, max_pixels=MAX_IMAGE_PIXELS)
        return decode_image(io.BytesIO(data), name=f"the image of {self.where}", max_pixels=MAX_IMAGE_PIXELS)

    def digest(self) -> str:
        """See :class:`ImageSource`. Reads the image's bytes."""
        data, path = self._content()
        if data is None:
            assert path is not None
            return FileImage(path).digest()
        return hashlib.sha256(data).hexdigest()

    def _content(self) -> tuple[bytes | None, Path | None]:
        data, path = self.images.read(self.file, self.row, 0)
        if data is not None:
            return data, None
        if path is None:
            raise DataError(f"{self.where}: the row has no image")
        return None, safe_join(self.images.paths[self.file].parent, path)
