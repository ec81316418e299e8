"""Where a question's image comes from: a file, or a handle that knows how to get it (a cell of a table, a row)."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path
from typing import Protocol

from PIL import Image

from dpa.data.images import load_image
from dpa.data.settings import DataSettings
from dpa.errors import DataError

MAX_IMAGE_PIXELS: int = DataSettings.model_fields["max_image_pixels"].default
"""Larger images are refused, in evaluation as in training."""


class LazyImage(Protocol):
    """An image that is read when it is needed. Small and picklable: with several devices it goes to another process."""

    def open(self) -> Image.Image:
        """Upright 8-bit RGB.

        Raises:
            DataError: missing, not an image, damaged, or larger than :data:`MAX_IMAGE_PIXELS`.
        """

    def digest(self) -> str:
        """Of the bytes as they lie on disk: another picture, another digest.

        Raises:
            DataError: they cannot be read.
        """


ImageSource = Path | LazyImage


def open_image(source: ImageSource) -> Image.Image:
    """Upright 8-bit RGB, whatever the source.

    Raises:
        DataError: see :class:`LazyImage`.
    """
    return load_image(source, max_pixels=MAX_IMAGE_PIXELS) if isinstance(source, Path) else source.open()


def image_digest(source: ImageSource) -> str:
    """Of the bytes as they lie on disk.

    Raises:
        DataError: they cannot be read.
    """
    if not isinstance(source, Path):
        return source.digest()
    try:
        status = source.stat()
        return _file_digest(source, status.st_size, status.st_mtime_ns)
    except OSError as error:
        raise DataError(f"{source} cannot be read ({error.strerror})") from None


@lru_cache(maxsize=65536)
def _file_digest(path: Path, size: int, modified: int) -> str:
    """Questions share images, and passes share questions: each file is read once while it does not change."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
