"""Files from strangers: every mode and size, broken ones, bombs, paths that leave the folder."""

from __future__ import annotations

import io
import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dpa.data.images import ImageMode, decode_image, load_image, safe_join
from dpa.errors import DataError
from tests.unit.data.helpers import SIDE, make_image, make_transform

BIG = 10_000_000


def pixel(image: Image.Image) -> tuple[int, ...]:
    value = image.getpixel((0, 0))
    assert isinstance(value, tuple)
    return tuple(int(channel) for channel in value)


@pytest.mark.parametrize(
    ("mode", "colour", "suffix", "expected"),
    [
        ("RGB", (10, 20, 30), "png", (10, 20, 30)),
        ("RGBA", (10, 20, 30, 0), "png", (10, 20, 30)),
        ("L", 77, "png", (77, 77, 77)),
        ("LA", (77, 3), "png", (77, 77, 77)),
        ("1", 1, "png", (255, 255, 255)),
        ("CMYK", (255, 0, 0, 0), "tiff", (0, 255, 255)),
        ("I;16", 0x4D00, "png", (0x4D, 0x4D, 0x4D)),
        ("I", 0x4D00, "tiff", (0x4D, 0x4D, 0x4D)),
        ("RGB", (10, 20, 30), "bmp", (10, 20, 30)),
        ("RGB", (10, 20, 30), "webp", None),
        ("L", 77, "jpg", (77, 77, 77)),
        ("CMYK", (255, 0, 0, 0), "jpg", None),
        ("YCbCr", (100, 128, 128), "tiff", None),
    ],
)
def test_every_mode_becomes_rgb(
    tmp_path: Path, mode: str, colour: int | tuple[int, ...], suffix: str, expected: tuple[int, ...] | None
) -> None:
    path = tmp_path / f"a.{suffix}"
    Image.new(mode, (5, 3), colour).save(path)
    image = load_image(path, max_pixels=BIG)
    assert image.mode == "RGB"
    assert image.size == (5, 3)
    if expected is not None:
        assert pixel(image) == expected


def test_palette_with_transparency_keeps_its_colours_and_does_not_warn(tmp_path: Path) -> None:
    image = Image.new("P", (2, 2), 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    image.save(tmp_path / "a.png", transparency=bytes([255, 0]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pixel(load_image(tmp_path / "a.png", max_pixels=BIG)) == (200, 100, 50)


def test_sixteen_bit_is_scaled_not_clipped(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(1, 256)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    values = np.asarray(load_image(tmp_path / "a.png", max_pixels=BIG))[0, :, 0]
    assert values.tolist() == list(range(256))


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    image = Image.new("RGB", (8, 4))
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees to see it upright
    image.save(tmp_path / "a.jpg", exif=exif)
    assert load_image(tmp_path / "a.jpg", max_pixels=BIG).size == (4, 8)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_does_not_lose_the_image(tmp_path: Path) -> None:
    Image.new("RGB", (8, 4)).save(tmp_path / "a.jpg", exif=b"Exif\0\0" + b"II*\0" + b"\xff" * 20)
    assert load_image(tmp_path / "a.jpg", max_pixels=BIG).size == (8, 4)


def test_animation_gives_its_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert pixel(load_image(tmp_path / "a.gif", max_pixels=BIG)) == (255, 0, 0)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "gif", "bmp"])
def test_truncated_file_is_refused(tmp_path: Path, suffix: str) -> None:
    path = make_image(tmp_path / f"a.{suffix}", (64, 64))
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    with pytest.raises(DataError, match=rf"image unreadable: .*a\.{suffix}.*"):
        load_image(path, max_pixels=BIG)


@pytest.mark.parametrize(
    "content", [b"", b"hello", b"\x89PNG\r\n\x1a\n" + b"\0" * 40, b"GIF89a", b"\xff\xd8\xff", b"<svg></svg>"]
)
def test_not_an_image_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"image unreadable: .*replace the file or remove the sample"):
        load_image(path, max_pixels=BIG)


def test_floating_point_pixels_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((2, 2), dtype=np.float32)).save(tmp_path / "a.tiff")
    with pytest.raises(DataError, match="floating-point"):
        load_image(tmp_path / "a.tiff", max_pixels=BIG)


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims to be enormous."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(("width", "height"), [(1001, 1000), (12_000, 12_000), (60_000, 60_000)])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bomb_is_refused_before_it_is_decoded(tmp_path: Path, width: int, height: int) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(bomb(width, height))
    with pytest.raises(DataError, match=r"image too large: .*a\.png.*data\.max_image_pixels"):
        load_image(path, max_pixels=1_000_000)


def test_too_large_names_both_numbers(tmp_path: Path) -> None:
    path = make_image(tmp_path / "a.png", (11, 10))
    with pytest.raises(DataError, match="11 x 10 = 110 pixels, allowed are 109"):
        load_image(path, max_pixels=109)
    assert load_image(path, max_pixels=110).size == (11, 10)


def test_the_setting_may_lie_above_pillows_own_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)
    path = make_image(tmp_path / "a.png", (10, 10))  # more than twice Pillow's limit
    assert load_image(path, max_pixels=100).size == (10, 10)


def test_missing_folder_and_pipe_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"image missing: .*nothing\.png does not exist"):
        load_image(tmp_path / "nothing.png", max_pixels=BIG)
    with pytest.raises(DataError, match="is not a file"):
        load_image(tmp_path, max_pixels=BIG)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="is not a file"):  # and does not wait for a writer
        load_image(tmp_path / "pipe", max_pixels=BIG)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "a\0.png",
        "../a.png",
        "x/../../a.png",
        "x/..",
        "/etc/passwd",
        "C:\\a.png",
        "C:a.png",
        "\\\\host\\a.png",
        "..\\a.png",
    ],
)
def test_paths_that_leave_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="image path refused"):
        safe_join(tmp_path, name)


@pytest.mark.parametrize("name", ["a.png", "x/y/a.png", "./a.png", "..a.png", "a..b/c.png", "ü/émoji 🙂.png"])
def test_paths_inside_are_joined(tmp_path: Path, name: str) -> None:
    assert safe_join(tmp_path, name) == tmp_path / name


def test_links_inside_the_folder_are_followed(tmp_path: Path) -> None:
    make_image(tmp_path / "elsewhere" / "a.png")
    (tmp_path / "images").symlink_to(tmp_path / "elsewhere")
    assert load_image(safe_join(tmp_path / "images", "a.png"), max_pixels=BIG).size == (10, 7)


SIZES = [(1, 1), (3, 3), (1, 9), (9, 1), (8, 8), (7, 500), (500, 7), (64, 48), (3, 100)]


@pytest.mark.parametrize("mode", ["crop", "pad"])
@pytest.mark.parametrize("size", SIZES)
def test_transform_is_the_processor(mode: ImageMode, size: tuple[int, int]) -> None:
    transform = make_transform(mode)
    width, height = size
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8))
    pixels = transform(image)
    assert pixels.dtype == torch.float32
    assert pixels.shape == (3, SIDE, SIDE)
    served = transform.image_processor([image, image], return_tensors="pt")["pixel_values"]
    assert torch.equal(pixels, served[1])


def test_pad_adds_the_mean_colour_and_crop_cuts() -> None:
    image = Image.new("RGB", (8 * SIDE, 2 * SIDE), (255, 0, 0))
    padded, cropped = make_transform("pad")(image), make_transform("crop")(image)
    assert padded[:, 0, 0].abs().max() < 0.02  # the mean colour is zero after normalisation, within a grey level
    assert torch.allclose(cropped[:, 0, 0], cropped[:, SIDE // 2, SIDE // 2])
    assert cropped[0, 0, 0] > 1


@pytest.mark.parametrize("mode", ["crop", "pad"])
def test_long_thin_image_is_refused_before_it_grows(mode: ImageMode) -> None:
    transform = make_transform(mode, max_pixels=10_000)
    with pytest.raises(DataError, match=r"image too large: 1 x 2000 pixels, .* become \d+, allowed are 10000"):
        transform(Image.new("RGB", (1, 2000)))
    assert transform(Image.new("RGB", (50, 60))).shape == (3, SIDE, SIDE)


def test_loading_from_memory_is_the_same_as_from_a_file(tmp_path: Path) -> None:
    path = make_image(tmp_path / "a.png", (33, 21))
    there = decode_image(io.BytesIO(path.read_bytes()), name="a", max_pixels=BIG)
    assert np.array_equal(np.asarray(there), np.asarray(load_image(path, max_pixels=BIG)))


class TestReducedDecode:
    @staticmethod
    def photograph(path: Path, size: tuple[int, int]) -> Path:
        """Smooth, as photographs are: a reduced decode of noise has little to do with the image."""
        coarse = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8))
        coarse.resize(size, Image.Resampling.BICUBIC).save(path, quality=95)
        return path

    @pytest.mark.parametrize(
        ("mode", "size", "expected"),
        [
            ("crop", (160, 64), (40, 16)),  # the shorter edge keeps twice the side (8)
            ("crop", (160, 63), (80, 32)),
            ("crop", (64, 31), (64, 31)),
            ("pad", (160, 64), (20, 8)),  # the longer one does
            ("pad", (31, 20), (31, 20)),
            ("pad", (400, 3), (200, 2)),  # neither edge may vanish
        ],
    )
    def test_at_least_twice_the_side_is_left(
        self, tmp_path: Path, mode: ImageMode, size: tuple[int, int], expected: tuple[int, int]
    ) -> None:
        path = self.photograph(tmp_path / "a.jpg", size)
        assert load_image(path, max_pixels=BIG, reduce_to=make_transform(mode)).size == expected
        assert load_image(path, max_pixels=BIG).size == size

    def test_pixels_differ_a_little(self, tmp_path: Path) -> None:
        transform = make_transform("crop")
        path = self.photograph(tmp_path / "a.jpg", (160, 96))
        whole = transform(load_image(path, max_pixels=BIG))
        reduced = transform(load_image(path, max_pixels=BIG, reduce_to=transform))
        # less than a grey level on average: one is 1 / 255 / 0.27 (the deviation) or more
        assert 0 < float((whole - reduced).abs().mean()) < 0.0145

    def test_other_formats_and_turned_images(self, tmp_path: Path) -> None:
        transform = make_transform("crop")
        png = make_image(tmp_path / "a.png", (64, 64))
        assert load_image(png, max_pixels=BIG, reduce_to=transform).size == (64, 64)
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.open(self.photograph(tmp_path / "a.jpg", (160, 64))).save(tmp_path / "turned.jpg", exif=exif)
        assert load_image(tmp_path / "turned.jpg", max_pixels=BIG, reduce_to=transform).size == (16, 40)

    def test_the_limit_counts_what_the_header_says(self, tmp_path: Path) -> None:
        path = self.photograph(tmp_path / "a.jpg", (160, 64))
        with pytest.raises(DataError, match="160 x 64 = 10240 pixels, allowed are 10000"):
            load_image(path, max_pixels=10_000, reduce_to=make_transform("crop"))
