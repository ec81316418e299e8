"""The parts that a model is made of, before they are joined: LLM, tokenizer, vision tower, and what a tower is like.

Legend: C channels, R image side in pixels.
"""

from __future__ import annotations

import importlib.resources
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPVisionModel,
    Dinov2Model,
    Dinov2WithRegistersModel,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    SiglipVisionModel,
)
from transformers.utils.hub import cached_file

from dpa.errors import ModelError
from dpa.log import get_logger
from dpa.models.families import Family, family_of
from dpa.models.settings import ModelSettings

LAB_PARTS: dict[str, str] = {"lab:llm": "llm", "lab:tower": "tower"}
"""Names of the shipped parts -> their folder in ``dpa/lab/assets``."""

_VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True, slots=True)
class Tower:
    """One row of the tower table."""

    model_class: type[PreTrainedModel]
    has_class_token: bool
    """The first row of its hidden states is no patch. SigLIP has none: cutting the first row would cut a patch."""
    registers_field: str | None
    """Configuration field with the number of register tokens, which stand between class token and patches. LLaVA's
    ``default`` cuts the class token alone, so the LLM sees them: an image has so many tokens more."""
    layers: str
    """Path of the list of transformer layers inside the model."""
    published_prefix: str
    """What published weights put before this tower's names (transformers 5 dropped it from the module names)."""
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    """Used where the tower's folder has no preprocessor_config.json."""


_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_HALF = (0.5, 0.5, 0.5)

TOWERS: dict[str, Tower] = {
    "clip_vision_model": Tower(CLIPVisionModel, True, None, "encoder.layers", "vision_model.", _CLIP_MEAN, _CLIP_STD),
    "siglip_vision_model": Tower(SiglipVisionModel, False, None, "encoder.layers", "vision_model.", _HALF, _HALF),
    "dinov2": Tower(Dinov2Model, True, None, "encoder.layer", "", _IMAGENET_MEAN, _IMAGENET_STD),
    "dinov2_with_registers": Tower(
        Dinov2WithRegistersModel, True, "num_register_tokens", "encoder.layer", "", _IMAGENET_MEAN, _IMAGENET_STD
    ),
}
"""``model_type`` of a vision configuration -> its row. SigLIP 2 at a fixed resolution is a ``siglip``, too."""

_VISION_PART: dict[str, str] = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}
"""Models of two towers whose vision tower is wanted."""

_NAFLEX = ("siglip2", "siglip2_vision_model")
"""SigLIP 2 with images of any shape: patches come padded, with a mask, which LLaVA's class does not hand on."""


def tower_row(config: PreTrainedConfig) -> Tower:
    """The row of a vision configuration.

    Raises:
        ModelError: the table has none.
    """
    row = TOWERS.get(config.model_type)
    if row is None and config.model_type in _NAFLEX:
        raise ModelError(
            f"vision tower of model_type {config.model_type!r} is a NaFlex SigLIP 2: its images have no fixed number "
            "of tokens, which LLaVA's model class needs. Use a SigLIP 2 of fixed resolution, such as "
            "google/siglip2-so400m-patch14-384 (model_type siglip)"
        )
    if row is None:
        raise ModelError(
            f"vision tower of model_type {config.model_type!r} is not known; known: {', '.join(sorted(TOWERS))}. To "
            "add one, give dpa.models.parts.TOWERS a row that says whether its hidden states start with a class token"
        )
    return row


def image_tokens_of(config: Any) -> int:
    """Rows per image that the connector gets: the tower's patches and registers, without a class token."""
    patches_per_side = int(config.image_size) // int(config.patch_size)
    return patches_per_side**2 + registers_of(config)


def registers_of(config: PreTrainedConfig) -> int:
    """Register tokens between class token and patches."""
    field = tower_row(config).registers_field
    return 0 if field is None else int(config.to_dict()[field])


def select_strategy(config: PreTrainedConfig) -> Literal["default", "full"]:
    """LLaVA's name for it: ``default`` drops the first row (the class token), ``full`` keeps all."""
    return "default" if tower_row(config).has_class_token else "full"


def resolve_part(name: str) -> str:
    """A part's folder or hub id.

    Args:
        name: ``lab:llm`` or ``lab:tower`` (shipped with the package), a local folder, or a hub id.

    Returns:
        An absolute folder, or the hub id as it is.

    Raises:
        ModelError: an unknown lab part, a path that does not exist, or a folder without config.json.
    """
    if name.startswith("lab:"):
        if name not in LAB_PARTS:
            raise ModelError(f"unknown lab part {name!r}; there are {', '.join(sorted(LAB_PARTS))}")
        folder = Path(str(importlib.resources.files("dpa.lab"))) / "assets" / LAB_PARTS[name]
        if not (folder / "config.json").is_file():
            raise ModelError(
                f"{name}: {folder} is missing from this installation; install dpa from a release or a full checkout"
            )
        return str(folder)
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"{path} has no config.json: it is no Hugging Face model folder")
        return str(path.resolve())
    # "runs/old" where a folder "runs" lies here is a mistyped path, not somebody's repository on the hub.
    if path.exists() or not _HUB_ID.fullmatch(name) or ("/" in name and path.parent.is_dir()):
        what = "is a file, not a model folder" if path.exists() else "does not exist (and is no hub id)"
        raise ModelError(
            f"model {name!r} {what}; give a folder with config.json, a hub id such as org/name, or lab:..."
        )
    return name


def load_tokenizer(settings: ModelSettings) -> Any:
    """The LLM's tokenizer, exactly as its tokenizer.json says.

    ``AutoTokenizer`` would take vocabulary and merges from that file and the rest from the class that belongs to the
    model type: a Qwen2 architecture with a tokenizer of its own (the lab's) gets Qwen2's word pattern. A saved LLaVA
    is loaded from its tokenizer.json by everybody, so this is also what keeps training and serving alike.

    Raises:
        ModelError: it cannot be loaded, or has no fast version (character offsets are needed for label spans).
    """
    source = resolve_part(settings.llm)
    shared: dict[str, Any] = {"revision": settings.llm_revision, "trust_remote_code": settings.trust_remote_code}
    try:
        found = next((name for name in _VOCABULARY_FILES if _has_file(source, name, settings.llm_revision)), None)
        if found is None:  # transformers would make an empty tokenizer of the configuration alone
            place = "the folder" if Path(source).is_dir() else "the local cache, or on the hub if it can be reached"
            raise OSError(f"none of {', '.join(_VOCABULARY_FILES)} is in {place}")
        kind: Any = PreTrainedTokenizerFast if found == "tokenizer.json" else AutoTokenizer
        tokenizer = kind.from_pretrained(source, **shared)
    except (OSError, ValueError) as error:
        raise _cannot_load("tokenizer of LLM", settings.llm, error) from None
    if not tokenizer.is_fast:
        raise ModelError(f"LLM {settings.llm!r}: its tokenizer has no fast version; put a tokenizer.json beside it")
    return tokenizer


def _has_file(source: str, name: str, revision: str | None) -> bool:
    """In the folder, or (fetched into the local cache) in the hub's repository."""
    return cached_file(source, name, revision=revision, _raise_exceptions_for_missing_entries=False) is not None


def load_llm(settings: ModelSettings, *, dtype: torch.dtype) -> PreTrainedModel:
    """The LLM with its head, on the CPU, in evaluation mode.

    Args:
        settings: names the LLM and its attention kernel (``auto`` is the family's).
        dtype: of all weights.

    Raises:
        ModelError: it cannot be loaded, belongs to no known family, or is cut out for more than LLaVA's head can do.
    """
    source = resolve_part(settings.llm)
    shared: dict[str, Any] = {"revision": settings.llm_revision, "trust_remote_code": settings.trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(source, **shared)
    except (OSError, ValueError) as error:
        raise _cannot_load("LLM", settings.llm, error) from None
    family = family_of(config, load_tokenizer(settings))
    try:
        llm: Any = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, attn_implementation=attention_of(settings, family), **shared
        )
    except (OSError, ValueError, ImportError) as error:
        raise _cannot_load("LLM", settings.llm, error) from None
    head = llm.get_output_embeddings()
    if not isinstance(head, torch.nn.Linear) or "bias" in dict(head.named_parameters()):
        raise ModelError(f"LLM {settings.llm!r}: its head is {head}; LLaVA's is a linear layer without bias")
    model: PreTrainedModel = llm.eval()
    return model


def attention_of(settings: ModelSettings, family: Family) -> str:
    """The attention kernel to ask transformers for.

    Raises:
        ModelError: sdpa for a family whose attention has a soft-cap (some versions of transformers leave it out then).
    """
    if settings.attention == "auto":
        return family.attention
    if settings.attention == "sdpa" and family.attention != "sdpa":
        raise ModelError(
            f"model.attention sdpa cannot apply the attention soft-cap of {family.name}; use auto "
            f"({family.attention}), flex_attention or flash_attention_2"
        )
    return settings.attention


def tower_config(settings: ModelSettings) -> PreTrainedConfig:
    """The vision tower's configuration; of a CLIP or SigLIP folder its vision part's. Reads no weights.

    Raises:
        ModelError: it cannot be read, or the tower table has no row for it.
    """
    source = resolve_part(settings.vision_tower)
    try:
        whole: Any = AutoConfig.from_pretrained(
            source, revision=settings.vision_tower_revision, trust_remote_code=settings.trust_remote_code
        )
        config: PreTrainedConfig = whole.vision_config if whole.model_type in _VISION_PART else whole
        tower_row(config)
    except ModelError as error:
        raise ModelError(f"{settings.vision_tower!r}: {error}") from None
    except (OSError, ValueError) as error:
        raise _cannot_load("vision tower", settings.vision_tower, error) from None
    return config


def load_tower(settings: ModelSettings, *, dtype: torch.dtype) -> PreTrainedModel:
    """The vision tower, frozen, on the CPU, in evaluation mode. Of a CLIP or SigLIP folder its vision part.

    Raises:
        ModelError: it cannot be loaded, or the tower table has no row for it.
    """
    config = tower_config(settings)
    kind: Any = tower_row(config).model_class
    try:
        tower = kind.from_pretrained(
            resolve_part(settings.vision_tower),
            config=config,
            dtype=dtype,
            attn_implementation="sdpa",
            revision=settings.vision_tower_revision,
        )
    except (OSError, ValueError) as error:
        raise _cannot_load("vision tower", settings.vision_tower, error) from None
    frozen: PreTrainedModel = tower.requires_grad_(False).eval()
    return frozen


def grow_vocabulary(llm: Any, rows: int) -> int:
    """Makes room for ``rows`` token ids where the embeddings have fewer; returns how many rows were added.

    New rows are the mean of the old ones, in the embeddings (never read: image features take their place) and in the
    head (an average logit, so that no other token's probability changes much). Nothing is drawn at random.
    """
    before: int = llm.get_input_embeddings().weight.shape[0]
    if rows <= before:
        return 0
    with torch.random.fork_rng(devices=[]):  # transformers draws rows that are overwritten here
        llm.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():
        for weight in {llm.get_input_embeddings().weight, llm.get_output_embeddings().weight}:
            weight[before:] = weight[:before].float().mean(dim=0).to(weight.dtype)
    get_logger(__name__).warning(
        "the LLM's vocabulary of %d is full: embeddings and head grow to %d rows for the image token", before, rows
    )
    return rows - before


def frozen_features(tower: PreTrainedModel, pixel_values: Tensor, layer: int) -> Tensor:
    """Hidden states of one layer of the tower, all rows; only that layer's are kept in memory.

    Args:
        pixel_values: [I, C, R, R].
        layer: index into ``hidden_states`` as transformers counts: 0 is the embeddings, -1 the last layer's output.

    Raises:
        ModelError: the tower has no such layer.
    """
    layers = tower.get_submodule(tower_row(tower.config).layers)
    count = len(list(layers.children()))
    index = layer if layer >= 0 else count + 1 + layer
    if not 0 <= index <= count:
        raise ModelError(
            f"vision_feature_layer {layer}: the tower has {count} layers, so it can be {-count - 1} to {count}"
        )
    caught: list[Tensor] = []

    def catch_input(_: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        caught.append(inputs[0])

    def catch_output(_: torch.nn.Module, __: tuple[Any, ...], output: Any) -> None:
        caught.append(output[0] if isinstance(output, tuple) else output)

    children = list(layers.children())
    handle = (
        children[0].register_forward_pre_hook(catch_input)
        if index == 0
        else children[index - 1].register_forward_hook(catch_output)
    )
    try:
        tower(pixel_values)
    finally:
        handle.remove()
    return caught[0]


def _cannot_load(what: str, name: str, error: Exception) -> ModelError:
    first_line = str(error).strip().split("\n")[0].rstrip(".")
    return ModelError(f"{what} {name!r} cannot be loaded: {first_line}. Give a folder, a hub id, or lab:...")
