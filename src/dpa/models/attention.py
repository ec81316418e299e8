"""What an LLM is told about who sees whom in a pass over *some* positions of a batch (the image's tokens left out).

transformers has three habits that a pass with jumps in its position ids must be protected from:

* without a mask, a jump in position ids is read as the boundary of a packed sequence: a 2D mask is always passed, also
  where it is all ones;
* the flash-attention path drops an all-ones mask and looks for jumps again: sequence boundaries are passed explicitly;
* a sliding window counts the positions that are there: where it matters, masks are built from the original positions.

Legend: R rows of the pass, K positions per row (padded to the right), H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from dpa.errors import ModelError

FULL, SLIDING = "full_attention", "sliding_attention"
"""The names of transformers' ``config.layer_types``."""


def sliding_window(config: PreTrainedConfig) -> int | None:
    """How many tokens back, itself included, a position sees in layers with local attention; None: all layers see all.

    Raises:
        ModelError: a layer has neither full nor sliding attention (linear, chunked ...): leaving tokens out of such a
            layer is not the same as masking them.
    """
    kinds = set(_layer_kinds(config))
    if unknown := kinds - {FULL, SLIDING}:
        raise ModelError(
            f"{config.model_type}: layers with {', '.join(sorted(unknown))} cannot be run on text without its image "
            "tokens; use an LLM whose layers have full or sliding attention (Qwen2.5, Llama, Gemma-2, Mistral)"
        )
    return int(config.sliding_window) if SLIDING in kinds else None


def attention_arguments(
    config: PreTrainedConfig, embeds_RKH: Tensor, visible_RK: Tensor, position_RK: Tensor, *, span: int
) -> dict[str, Any]:
    """Keyword arguments of the decoder's forward with which position q sees the visible keys k <= q of its row.

    Args:
        config: the decoder's (text) configuration; its attention implementation decides about the masks' form.
        embeds_RKH: the pass's input; read for shape, type and device only.
        visible_RK: bool; False: nobody sees this key (padding, image tokens that are kept as readers only).
        position_RK: int64; original positions, by which sliding windows count; they may jump.
        span: positions of the original sequence at most; at or under the window no mask but the 2D one is needed.

    Raises:
        ModelError: a sliding window is shorter than ``span`` under flash-attention, which can only count the positions
            that are there.
    """
    window = sliding_window(config)
    flash = "flash" in config._attn_implementation
    if window is not None and span > window:
        if flash:
            raise ModelError(
                f"{config.model_type} with {config._attn_implementation}: a sample of up to {span} tokens is longer "
                f"than the sliding window of {window}, which flash-attention would count without the image's tokens; "
                "set model.attention to sdpa or eager, or max_length to the window"
            )
        return {"attention_mask": _windowed_masks(config, embeds_RKH, visible_RK, position_RK, window)}
    arguments: dict[str, Any] = {"attention_mask": visible_RK.to(torch.int64)}
    if flash:
        # Read only where the mask is all ones; with padding the boundaries are found from the mask.
        rows, length = visible_RK.shape
        boundaries = torch.arange(0, rows * length + 1, length, dtype=torch.int32, device=visible_RK.device)
        arguments |= {"cu_seq_lens_q": boundaries, "cu_seq_lens_k": boundaries}
        arguments |= {"max_length_q": length, "max_length_k": length}
    return arguments


def _windowed_masks(
    config: PreTrainedConfig, embeds_RKH: Tensor, visible_RK: Tensor, position_RK: Tensor, window: int
) -> Any:
    """The decoder's own masks with the window counted by original positions: one per kind of layer, or the only one."""

    def near(row: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return position_RK[row, query] - position_RK[row, key] < window

    settings: dict[str, Any] = {"config": config, "inputs_embeds": embeds_RKH, "attention_mask": visible_RK}
    settings["past_key_values"] = None
    # Left-out tokens only bring the rest closer together, so transformers' own window never hides what ``near`` shows.
    sliding = create_sliding_window_causal_mask(**settings, and_mask_function=near)
    if not _has_layer_types(config):  # Mistral: every layer has the window
        return sliding
    return {FULL: create_causal_mask(**settings), SLIDING: sliding}


@contextmanager
def nothing_seen_is_nothing_added(decoder: Any, visible_RK: Tensor, position_RK: Tensor) -> Iterator[None]:
    """While open, attention adds nothing to a position that sees no key, whatever the attention kernel.

    sdpa and flash-attention give zeros there. Eager attention adds one constant to all scores of such a position, which
    a softmax ignores: it would see everything, the future and the padding included (method.md, row "label that directly
    follows the image"). Hooks on the output projections make eager do as the others; they are gone afterwards.
    """
    config = decoder.config
    window = sliding_window(config)
    blind_RK = visible_RK.cumsum(dim=1) == 0
    near_blind_RK = blind_RK
    if window is not None:
        last_seen_RK = position_RK.masked_fill(~visible_RK, -window).cummax(dim=1).values
        near_blind_RK = position_RK - last_seen_RK >= window
    with ExitStack() as hooks:
        for layer, kind in zip(decoder.layers, _layer_kinds(config), strict=True):
            blind = near_blind_RK if kind == SLIDING else blind_RK
            projection: nn.Module = layer.self_attn.o_proj
            handle = projection.register_forward_pre_hook(partial(_silence, blind.unsqueeze(-1)))
            hooks.callback(handle.remove)
        yield


def _silence(blind_RK1: Tensor, _module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    return (inputs[0].masked_fill(blind_RK1, 0),)


def _layer_kinds(config: PreTrainedConfig) -> list[str]:
    """One of transformers' kinds per layer. Llama and Mistral have no list: all layers are alike."""
    if _has_layer_types(config):
        return list(config.layer_types)
    local = hasattr(config, "sliding_window") and config.sliding_window is not None
    return [SLIDING if local else FULL] * int(config.num_hidden_layers)


def _has_layer_types(config: PreTrainedConfig) -> bool:
    return hasattr(config, "layer_types") and config.layer_types is not None
