"""A checkpoint for evaluation, with stock transformers, in the precision that it is stored in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, ProcessorMixin
from transformers.utils.hub import cached_file

from dpa.errors import ModelError
from dpa.models.parts import resolve_part


def open_processor(checkpoint: str) -> ProcessorMixin:
    """The processor of a folder or hub id, with PIL's pixels: the ones that training saw, torchvision or not.

    Raises:
        ModelError: there is none, or it needs a package that is not installed.
    """
    source = resolve_part(checkpoint)
    try:
        if not Path(source).is_dir():
            cached_file(source, "config.json")  # one look decides whether the hub has it and can be reached
        processor: Any = AutoProcessor.from_pretrained(source, backend="pil")  # type: ignore[no-untyped-call]
    except (OSError, ValueError, ImportError) as error:
        raise _does_not_load(checkpoint, error) from None
    if not isinstance(processor, ProcessorMixin):
        raise ModelError(
            f"{checkpoint}: its processor is a {type(processor).__name__}, which takes no images together with text; "
            "a folder of an image-text-to-text model has a processor_config.json or preprocessor_config.json"
        )
    return processor


def load_model(checkpoint: str, device: str | torch.device) -> Any:
    """The model of a folder or hub id in evaluation mode.

    Raises:
        ModelError: it does not load as an image-text-to-text model.
    """
    try:
        model: Any = AutoModelForImageTextToText.from_pretrained(resolve_part(checkpoint), dtype="auto")
    except (OSError, ValueError, ImportError) as error:
        raise _does_not_load(checkpoint, error) from None
    return model.to(device).eval()


def _does_not_load(checkpoint: str, error: Exception) -> ModelError:
    return ModelError(f"{checkpoint} does not load as an image-text-to-text model: {str(error).strip()}")
