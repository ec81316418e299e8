"""From an image file to pixels, safely: files come from strangers.

Legend: C channels, R side of the square that the tower sees (pixels).
"""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, BinaryIO, Literal, get_args

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from dpa.errors import DataError

ImageMode = Literal["crop", "pad"]

REDUCED_SPARE = 2
"""What a reduced decode leaves of an image is at least so many times the side that it is then resized to."""
MENDING = "replace the file or remove the sample"


def safe_join(root: Path, relative: str) -> Path:
    """``root / relative``, which stays inside ``root``.

    Absolute paths and ``..`` are refused, in POSIX and Windows spelling. Links inside ``root`` are followed: image
    folders are often links to where the disk has room, and whoever can place a link there can place the image too.

    Raises:
        DataError: the path is empty or leaves ``root``.
    """
    if not relative or "\0" in relative:
        raise DataError(f"image path refused: {relative!r} is not a path below {root}")
    for path in (PurePosixPath(relative), PureWindowsPath(relative)):
        if path.is_absolute() or path.drive or path.root or ".." in path.parts:
            raise DataError(
                f"image path refused: {relative!r} leaves the image folder {root}; "
                "write paths relative to data.*.images, without '..'"
            )
    return root / relative


def load_image(path: Path, *, max_pixels: int, reduce_to: ImageTransform | None = None) -> Image.Image:
    """Reads an image file completely.

    The first frame, turned upright by its EXIF orientation, as 8-bit RGB: palettes and CMYK are converted, 16-bit grey
    is scaled, transparency is dropped (as LLaVA and transformers do).

    Args:
        path: any format that Pillow reads.
        max_pixels: width x height above it is refused before anything is decoded.
        reduce_to: a JPEG is decoded at 1/2, 1/4 or 1/8 of its size where at least :data:`REDUCED_SPARE` times the side
            that this transform resizes to is left. Faster; pixels after the resize differ a little. None: as it is.

    Raises:
        DataError: missing, not an image, truncated, damaged or too large.
    """
    # Not isfile: a device or a pipe would block for ever.
    if not os.path.exists(path):
        raise DataError(f"image missing: {path} does not exist; {MENDING}")
    if not os.path.isfile(path):
        raise DataError(f"image unreadable: {path} is not a file; {MENDING}")
    try:
        with open(path, "rb") as file:
            return decode_image(file, name=str(path), max_pixels=max_pixels, reduce_to=reduce_to)
    except OSError as error:
        raise DataError(f"image unreadable: {path}: {error.strerror or error}; {MENDING}") from None


def image_size(file: BinaryIO, *, name: str, max_pixels: int) -> tuple[int, int]:
    """Width and height as the header states them; the position in ``file`` moves.

    Raises:
        DataError: not an image, or more than ``max_pixels``.
    """
    return _open(file, name, max_pixels).size


def decode_image(file: BinaryIO, *, name: str, max_pixels: int, reduce_to: ImageTransform | None = None) -> Image.Image:
    """:func:`load_image` of an open file; ``name`` is for messages.

    Raises:
        DataError: see there.
    """
    image = _open(file, name, max_pixels)
    try:
        if reduce_to is not None:
            reduce_to.draft(image)
        image.load()
        return _to_rgb(_upright(image), name)
    except DataError:
        raise
    except Exception as error:  # damaged files make Pillow's decoders raise nearly anything
        raise DataError(
            f"image unreadable: {name} cannot be decoded ({_first_line(error)}): truncated or damaged; {MENDING}"
        ) from None


def _open(file: BinaryIO, name: str, max_pixels: int) -> Image.Image:
    # Pillow has a limit of its own (89 million, for the whole process); ours may only lift it, then ours decides.
    if Image.MAX_IMAGE_PIXELS is not None and max_pixels > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = max_pixels
    try:
        image = Image.open(file)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f"image too large: {name}: {_first_line(error)}; {_TOO_LARGE}") from None
    except Exception as error:  # as above
        raise DataError(f"image unreadable: {name} is not an image ({_first_line(error)}); {MENDING}") from None
    width, height = image.size
    if width * height > max_pixels:
        raise DataError(too_large(name, width, height, max_pixels))
    return image


_TOO_LARGE = "make it smaller, remove the sample, or raise data.max_image_pixels"


def too_large(name: str, width: int, height: int, max_pixels: int) -> str:
    """The message for an image above the limit."""
    return (
        f"image too large: {name} has {width} x {height} = {width * height} pixels, "
        f"allowed are {max_pixels}; {_TOO_LARGE}"
    )


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF data: pixels are fine, and every viewer shows them as they are
        return image


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):  # Pillow's own conversion clips at 255: a 16-bit image would turn white
        values = np.asarray(image)
        low, high = int(values.min()), int(values.max())
        if low < 0 or high > 0xFFFF:
            raise DataError(
                f"image unreadable: {name} has grey values from {low} to {high}, more than 16 bit; "
                "convert it to 8 bit or remove the sample"
            )
        return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise DataError(
            f"image unreadable: {name} has floating-point pixels, whose range is not defined; "
            "convert it to 8 bit or remove the sample"
        )
    if image.mode in ("P", "PA", "RGBa", "La"):  # straight to RGB, Pillow warns or refuses; the colours are the same
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    return image.convert("RGB")


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}".removesuffix(": ")


class ImageTransform:
    """An image as the tower wants it: the image processor that is saved with the checkpoint, and nothing else.

    Training and serving therefore see the same pixels. Which of the two modes it is lies in the processor
    (``models.processor.make_image_processor``); ``mode`` says what it was made for.
    """

    def __init__(self, image_processor: Any, mode: ImageMode, side: int, *, max_pixels: int) -> None:
        """
        Args:
            image_processor: transformers' image processor (PIL backend).
            mode: ``crop``: resize the shorter edge, crop the centre; ``pad``: pad to a square with the mean colour,
                resize.
            side: R.
            max_pixels: limit of what resizing and padding may make in between.
        """
        assert mode in get_args(ImageMode), mode
        self.image_processor = image_processor
        self.mode: ImageMode = mode
        self.side = side
        self.max_pixels = max_pixels

    def __call__(self, image: Image.Image) -> Tensor:
        """RGB image -> float32 [C, R, R].

        Raises:
            DataError: see :meth:`check_size`.
        """
        self.check_size(*image.size)
        pixels_1CRR: Tensor = self.image_processor(images=image, return_tensors="pt")["pixel_values"]
        assert tuple(pixels_1CRR.shape) == (1, 3, self.side, self.side), (pixels_1CRR.shape, self.side)
        return pixels_1CRR[0].to(torch.float32)

    def check_size(self, width: int, height: int) -> None:
        """A long thin image is small on disk and enormous once its shorter edge is resized or it is padded.

        Raises:
            DataError: the image in between would have more than ``max_pixels``.
        """
        long, short = max(width, height), min(width, height)
        between = long * long if self.mode == "pad" else self.side * max(self.side, self.side * long // short)
        if between > self.max_pixels:
            how = "padded to a square" if self.mode == "pad" else f"with its shorter edge resized to {self.side}"
            raise DataError(
                f"image too large: {width} x {height} pixels, {how}, become {between}, allowed are {self.max_pixels}; "
                f"{_TOO_LARGE}"
            )

    def draft(self, image: Image.Image) -> None:
        """Lets Pillow decode a JPEG that is not loaded yet at a fraction of its size; other formats stay as they are.

        ``crop`` resizes the shorter edge to R, ``pad`` the longer one: that edge keeps :data:`REDUCED_SPARE` R or more.
        """
        width, height = image.size
        edge = max(width, height) if self.mode == "pad" else min(width, height)
        factor = edge // (REDUCED_SPARE * self.side)
        if factor >= 2:
            image.draft(None, (max(1, width // factor), max(1, height // factor)))
