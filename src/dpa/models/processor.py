"""The processor that is saved with a checkpoint: the tower's pixels and the family's chat text in stock classes.

Pixels come from transformers' PIL backend, always: it is there with and without torchvision, and gives the same values
on both machines. In a saved folder the class is ``LlavaImageProcessor``; a machine with torchvision that loads it by
``AutoProcessor`` gets torchvision's resize, which differs by up to one grey level, unless it passes ``backend="pil"``.
"""

from __future__ import annotations

import math
from typing import Any, Literal

from transformers import LlavaProcessor
from transformers.models.auto.image_processing_auto import get_image_processor_config
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from dpa.models.parts import image_tokens_of, registers_of, resolve_part, select_strategy, tower_row
from dpa.models.settings import ModelSettings
from dpa.types import TextRules

ImageMode = Literal["crop", "pad"]


def make_image_processor(settings: ModelSettings, vision_config: Any, mode: ImageMode) -> Any:
    """Pixels as the tower wants them.

    Args:
        settings: names the tower; mean, deviation, resampling and scale come from its preprocessor_config.json, or
            from the tower table where it has none.
        vision_config: fixes the side.
        mode: ``crop`` resizes the shorter edge and crops the centre; ``pad`` pads to a square with the mean colour
            first (then nothing is left to crop). Method, table of stages: crop in stage 2, pad in stage 3 and after.
    """
    row = tower_row(vision_config)
    own: dict[str, Any] = get_image_processor_config(  # {} where there is none
        resolve_part(settings.vision_tower), revision=settings.vision_tower_revision
    )
    values: dict[str, Any] = {"image_mean": list(row.image_mean), "image_std": list(row.image_std)}
    values |= {name: own[name] for name in ("image_mean", "image_std", "resample", "rescale_factor") if name in own}
    side = int(vision_config.image_size)
    return LlavaImageProcessorPil(
        do_pad=mode == "pad",
        do_resize=True,
        size={"shortest_edge": side},
        do_center_crop=True,
        crop_size={"height": side, "width": side},
        do_convert_rgb=True,
        **values,
    )


def make_processor(image_processor: Any, tokenizer: Any, rules: TextRules, vision_config: Any) -> LlavaProcessor:
    """Composes the processor; nothing of the parts is copied. Batches for generation are padded on the left.

    Raises:
        ModelError: the tower table has no row for ``vision_config``.
    """
    # LLaVA's processor counts patches: a pooled connector's tokens are patches of twice the side
    pooled = math.isqrt(image_tokens_of(vision_config) // rules.image_tokens)
    tokenizer.padding_side = "left"  # read by the processor alone: training collates by itself, on the right
    return LlavaProcessor(  # type: ignore[no-untyped-call]
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=int(vision_config.patch_size) * pooled,
        vision_feature_select_strategy=select_strategy(vision_config),
        chat_template=rules.chat_template,
        image_token=rules.image_token,
        num_additional_image_tokens=int(tower_row(vision_config).has_class_token) + registers_of(vision_config),
    )
