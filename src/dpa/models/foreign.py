"""LLaVA checkpoints of whatever origin: opened, checked, and given this project's text rules. Reads no weights.

What is in use on the hub (``llava-hf/llava-1.5-7b-hf`` and its kin) and what follows from it:

| there | here |
|---|---|
| ``image_token_index`` (transformers 4) or ``image_token_id`` | either; the token's text comes from the tokenizer |
| a vocabulary padded to a multiple of 64 (32064 rows for 32002 tokens) | rows beyond the tokenizer are kept |
| ``image_seq_length`` missing, or its default of 576 beside another tower | counted from the tower |
| a template in ``chat_template.json`` that takes typed parts alone | plain strings are made typed parts before it |
| Vicuna's template there never closes an answer (no ``</s>``), so it cannot be trained with | the family's own format |
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from jinja2.exceptions import TemplateError
from transformers import AutoConfig, PreTrainedTokenizerFast
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from dpa.errors import ModelError
from dpa.log import get_logger
from dpa.models.connectors import kind_of, tokens_per_image
from dpa.models.families import Family, family_of, text_rules
from dpa.models.parts import load_tokenizer, resolve_part, select_strategy
from dpa.models.settings import ModelSettings
from dpa.models.template import MARK, typed_serving_template
from dpa.types import TextRules

_FILES = ("*.json", "*.jinja", "*.safetensors", "*.model", "*.txt")


@dataclass(frozen=True, slots=True)
class Opened:
    """A checkpoint without its weights."""

    folder: Path
    config: Any
    """A LlavaConfig (``image_seq_length`` is the tower's), or an AyaVisionConfig for connector ``pooled``."""
    tokenizer: Any
    image_processor: Any
    family: Family
    rules: TextRules


def checkpoint_folder(source: str, revision: str | None = None) -> Path:
    """The local folder of a checkpoint.

    Args:
        source: a folder, or a hub id (fetched into the local cache where it is not there yet).
        revision: of the hub id.

    Raises:
        ModelError: no such folder, or a hub id that is neither in the cache nor reachable.
    """
    resolved = resolve_part(source)
    if Path(resolved).is_dir():
        return Path(resolved)
    try:
        return Path(snapshot_download(resolved, revision=revision, allow_patterns=list(_FILES)))
    except (OSError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"checkpoint {source!r} is neither in the local cache nor reachable: {reason}") from None


def open_checkpoint(folder: Path) -> Opened:
    """Configuration, tokenizer, image processor and text rules of a ``LlavaForConditionalGeneration`` folder (or of its
    sister's, see ``connectors``).

    Raises:
        ModelError: another class of model, an unknown family or tower, or files that contradict each other.
    """
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} is no checkpoint folder: config.json is missing")
    try:
        stated: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        _check_class(folder, stated)
        config: Any = AutoConfig.from_pretrained(folder)
        tokenizer = _tokenizer(folder)
        image_processor = LlavaImageProcessorPil.from_pretrained(folder)
    except (OSError, ValueError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{folder} cannot be read as a LLaVA checkpoint: {str(error).splitlines()[0]}") from None
    _check_form(folder, config)
    family = _family(folder, config, tokenizer)
    rules = _rules(folder, family, tokenizer, tokens_per_image(kind_of(config), config.vision_config))
    if rules.image_token_id != config.image_token_index:
        raise ModelError(
            f"{folder}: config.json says image token {config.image_token_index}, the tokenizer's {rules.image_token} "
            f"is {rules.image_token_id}; the folder mixes files of two checkpoints"
        )
    if config.model_type == "llava":
        config.image_seq_length = rules.image_tokens
    return Opened(folder, config, tokenizer, image_processor, family, rules)


def _check_class(folder: Path, stated: dict[str, Any]) -> None:
    kind = stated.get("model_type")
    if kind in ("llava", "aya_vision") and "text_config" in stated:
        return
    if kind == "llava_next":
        what = "LLaVA-NeXT cuts an image into tiles with newlines between their rows; here an image is one square"
    elif "mm_projector_type" in stated or str(kind).startswith("llava_"):
        what = "it is in LLaVA's own layout: take its connector with model.connector_from and its LLM with model.llm"
    else:
        what = "give a folder whose config.json has model_type llava"
    raise ModelError(f"{folder} is no LLaVA checkpoint of transformers (model_type {kind!r}): {what}")


def _check_form(folder: Path, config: Any) -> None:
    """What this project's forward relies on."""
    strategy = select_strategy(config.vision_config)
    if config.vision_feature_select_strategy != strategy:
        raise ModelError(
            f"{folder}: vision_feature_select_strategy {config.vision_feature_select_strategy!r} with a "
            f"{config.vision_config.model_type}; only {strategy!r} is supported for this tower (its patches, without a "
            "class token)"
        )
    if not isinstance(config.vision_feature_layer, int):
        raise ModelError(f"{folder}: vision_feature_layer {config.vision_feature_layer}: one layer is supported")
    if config.model_type != "llava":
        return
    if config.projector_hidden_act not in ("gelu", "linear") or not config.multimodal_projector_bias:
        raise ModelError(
            f"{folder}: its connector has activation {config.projector_hidden_act!r} and bias "
            f"{config.multimodal_projector_bias}; supported are gelu (mlp2x_gelu) and linear, with biases"
        )


def _tokenizer(folder: Path) -> Any:
    """Exactly as tokenizer.json says; without one, converted from the slow tokenizer's files."""
    if (folder / "tokenizer.json").is_file():
        tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(folder)
    else:
        tokenizer = load_tokenizer(ModelSettings(llm=str(folder)))
    if tokenizer.chat_template is None:
        tokenizer.chat_template = _template_beside(folder)
    return tokenizer


def _template_beside(folder: Path) -> str | None:
    """A template that belongs to the processor alone: where transformers 4 and 5 keep it."""
    for name in ("chat_template.json", "processor_config.json"):
        if (folder / name).is_file():
            template = json.loads((folder / name).read_text(encoding="utf-8")).get("chat_template")
            if template is not None:
                return str(template)
    return None


def _family(folder: Path, config: Any, tokenizer: Any) -> Family:
    """The LLM's row, with the image token that this checkpoint uses."""
    family = family_of(config.text_config, tokenizer)
    token = None
    if config.image_token_index < len(tokenizer):
        token = tokenizer.convert_ids_to_tokens(config.image_token_index)
    rows = int(config.text_config.vocab_size)
    if token is None or config.image_token_index >= rows:
        raise ModelError(
            f"{folder}: config.json says image token {config.image_token_index}, but the tokenizer has "
            f"{len(tokenizer)} tokens and the embeddings have {rows} rows; the folder mixes files of two checkpoints"
        )
    return family if token == family.image_token else _with_token(folder, family, tokenizer, token)


def _with_token(folder: Path, family: Family, tokenizer: Any, token: str) -> Family:
    if token not in tokenizer.added_tokens_encoder:
        number = tokenizer.convert_tokens_to_ids(token)
        raise ModelError(
            f"{folder}: config.json says image token {number}, which is {token!r} in the tokenizer, an ordinary piece "
            "of text; the folder mixes files of two checkpoints"
        )
    return replace(family, image_token=token)


def _rules(folder: Path, family: Family, tokenizer: Any, image_tokens: int) -> TextRules:
    """Text rules from the checkpoint's own template, or, where it cannot be trained with, from the family's.

    Raises:
        ModelError: neither will do.
    """
    template = tokenizer.chat_template
    if isinstance(template, str) and not template.startswith(MARK) and not _takes_strings(tokenizer, template):
        tokenizer.chat_template = typed_serving_template(
            template, family.image_token, leading=_adds_bos(tokenizer) and "bos_token" not in template
        )
    try:
        return text_rules(family, tokenizer, image_tokens)
    except ModelError as error:
        if family.template is None or template is None or (isinstance(template, str) and template.startswith(MARK)):
            raise
        get_logger(__name__).warning(
            "%s: its chat template cannot be trained with (%s); the format of family %s is used and saved instead",
            folder,
            str(error).rstrip("."),
            family.name,
        )
    tokenizer.chat_template = None
    return text_rules(family, tokenizer, image_tokens)


def _takes_strings(tokenizer: Any, template: str) -> bool:
    """Whether plain strings come through; templates for typed parts leave them out or fail."""
    turns = [{"role": "user", "content": "QUESTION"}]
    try:
        return "QUESTION" in tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False)
    except (TemplateError, TypeError):
        return False


def _adds_bos(tokenizer: Any) -> bool:
    ids: list[int] = tokenizer("x")["input_ids"]
    return tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]
