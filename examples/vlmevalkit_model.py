"""A model class for VLMEvalKit: any checkpoint of ours or llava-hf's, in its own precision, with VLMEvalKit's prompts.

Copy it to ``vlmeval/vlm/dpa_checkpoint.py`` and add ``from .dpa_checkpoint import DpaCheckpoint`` to
``vlmeval/vlm/__init__.py``; docs/evaluation.md has the commands. It needs no dpa.
"""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from vlmeval.vlm.base import BaseModel


class DpaCheckpoint(BaseModel):  # type: ignore[misc]
    """Greedy, one question at a time, as VLMEvalKit asks."""

    INSTALL_REQ = False
    INTERLEAVE = True

    def __init__(self, model_path: str, max_new_tokens: int = 128) -> None:
        super().__init__()
        # PIL's pixels are the ones that training saw, with and without torchvision
        self.processor = AutoProcessor.from_pretrained(model_path, backend="pil")
        self.model = AutoModelForImageTextToText.from_pretrained(model_path, dtype="auto")
        self.model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        self.max_new_tokens = max_new_tokens

    def generate_inner(self, message: list[dict[str, str]], dataset: str | None = None) -> str:
        """Parts are {"type": "image" | "text", "value": path or text}; images go before the text, as in training."""
        images = [Image.open(part["value"]).convert("RGB") for part in message if part["type"] == "image"]
        text = "\n".join(part["value"] for part in message if part["type"] == "text")
        content: list[dict[str, str]] = [*({"type": "image"} for _ in images), {"type": "text", "text": text}]
        prompt = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        bos = self.processor.tokenizer.bos_token
        inputs: Any = self.processor(
            text=[prompt],
            images=[images] if images else None,
            return_tensors="pt",
            add_special_tokens=not (bos and prompt.startswith(bos)),  # a template's own BOS is not doubled
        ).to(self.model.device, dtype=self.model.dtype)
        with torch.no_grad():
            output = self.model.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=self.max_new_tokens)
        answer = output[0, inputs["input_ids"].shape[1] :]
        return str(self.processor.tokenizer.decode(answer, skip_special_tokens=True)).strip()
