from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dpa.models.parts import load_tower
from dpa.models.processor import make_image_processor
from dpa.models.settings import ModelSettings
from dpa.models.vlm import build_vlm

Make = Callable[..., ModelSettings]


def picture(width: int, height: int) -> Image.Image:
    """Left half red, right half blue."""
    array = np.zeros((height, width, 3), dtype=np.uint8)
    array[:, : width // 2, 0] = 255
    array[:, width // 2 :, 2] = 255
    return Image.fromarray(array)


def pixels_of(settings: ModelSettings, mode: Any, image: Image.Image) -> torch.Tensor:
    vision = load_tower(settings, dtype=torch.float32).config
    pixels: torch.Tensor = make_image_processor(settings, vision, mode)(image, return_tensors="pt")["pixel_values"]
    return pixels


@pytest.mark.parametrize("mode", ["crop", "pad"])
@pytest.mark.parametrize("size", [(16, 16), (40, 20), (20, 41), (7, 9), (640, 31)])
def test_every_size_becomes_the_towers(settings: Make, mode: str, size: tuple[int, int]) -> None:
    assert pixels_of(settings(), mode, picture(*size)).shape == (1, 3, 16, 16)


def test_pad_adds_the_mean_colour_above_and_below(settings: Make) -> None:
    pixels = pixels_of(settings(), "pad", picture(32, 16))[0]
    assert pixels[:, :2].abs().max() < 1 / 255 / 0.26, "the mean, rounded down to a grey level (deviation 0.26)"
    assert pixels[:, 8, 0].abs().min() > 0.5, "the picture itself"


def test_crop_takes_the_centre(settings: Make) -> None:
    pixels = pixels_of(settings(), "crop", picture(48, 16))[0]
    red, blue = pixels[0], pixels[2]
    assert (red[:, :7] > 0).all()
    assert (blue[:, 9:] > 0).all()
    assert (blue[:, :7] < 0).all()


def test_mean_and_deviation_of_the_towers_folder(settings: Make) -> None:
    black = Image.new("RGB", (16, 16))
    own = pixels_of(settings(), "pad", black)[0, :, 0, 0]  # mean 0.4, 0.5, 0.6; CLIP's deviation
    expected = torch.tensor([-0.4 / 0.26862954, -0.5 / 0.26130258, -0.6 / 0.27577711])
    torch.testing.assert_close(own, expected, rtol=0, atol=1e-5)
    table = pixels_of(settings(tower="siglip"), "pad", black)[0, :, 0, 0]  # no preprocessor_config.json there
    torch.testing.assert_close(table, torch.tensor([-1.0, -1.0, -1.0]))


@pytest.mark.parametrize("tower", ["clip", "siglip", "dinov2"])
def test_placeholders_per_image(settings: Make, tower: str) -> None:
    vlm = build_vlm(settings("llama3", tower))
    text = f"{vlm.rules.image_token}\nwhat? {vlm.rules.image_token}"
    inputs = vlm.processor(text=text, images=[picture(30, 20), picture(8, 8)], return_tensors="pt")
    assert int((inputs["input_ids"] == vlm.rules.image_token_id).sum()) == 2 * vlm.rules.image_tokens
    with torch.no_grad():
        vlm.model(**inputs)  # transformers counts placeholders against features itself


def test_pil_backend_and_left_padding(settings: Make) -> None:
    processor = build_vlm(settings()).processor
    assert processor.image_processor.backend == "pil"
    assert processor.tokenizer.padding_side == "left"


def test_crop_mode_is_saved_as_such(settings: Make) -> None:
    assert build_vlm(settings(), image_mode="crop").processor.image_processor.do_pad is False
    assert build_vlm(settings()).processor.image_processor.do_pad is True
