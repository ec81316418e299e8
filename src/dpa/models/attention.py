"""What an LLM is told about who sees whom in a pass over *some* positions of a batch (the image's tokens left out), or
over rows that hold several samples.

transformers has four habits that a pass with jumps in its position ids must be protected from:

* without a mask, a jump in position ids is read as the boundary of a packed sequence: a 2D mask is always passed, also
  where it is all ones;
* the flash-attention path drops an all-ones mask and looks for jumps again: sequence boundaries are passed explicitly;
* a sliding window counts the positions that are there: where it matters, masks are built from the original positions;
* eager attention takes its softmax in float32, where "not seen" of a float64 model is minus infinity: padding whose
  window holds padding alone would be NaN, and so would all that is multiplied with it by a weight of zero. There the
  masks are our own, too, in which nothing is blind.

Samples that share a row never see each other: sdpa, eager and flex get masks that say so (flex a block mask, which
skips what nobody sees), flash-attention gets the boundaries. They are never left to be guessed from position ids.

Legend: R rows of the pass, K positions per row (padded to the right), H hidden size.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask
from transformers import PreTrainedConfig

from dpa.errors import ModelError
from dpa.models.rows import Rows

DENSE_ROW = 128
"""Slots up to which packed rows are filled, if no sample is longer, where a kernel's cost grows with the square of the
row (sdpa, eager). Short captions are left almost without padding; ``benchmarks/packing.py --row`` tries others."""

FULL, SLIDING = "full_attention", "sliding_attention"
"""The names of transformers' ``config.layer_types``."""


def sliding_window(config: PreTrainedConfig) -> int | None:
    """How many tokens back, itself included, a position sees in layers with local attention; None: all layers see all.

    Raises:
        ModelError: a layer has neither full nor sliding attention (linear, chunked ...): leaving tokens out of such a
            layer is not the same as masking them, and nothing parts the samples of a row.
    """
    kinds = set(_layer_kinds(config))
    if unknown := kinds - {FULL, SLIDING}:
        raise ModelError(
            f"{config.model_type}: layers with {', '.join(sorted(unknown))} cannot be run on text without its image "
            "tokens, nor on several samples in a row; use an LLM whose layers have full or sliding attention (Qwen2.5, "
            "Qwen3, Llama, Gemma, Phi, Mistral)"
        )
    return int(config.sliding_window) if SLIDING in kinds else None


def check_length(config: PreTrainedConfig, length: int) -> None:
    """
    Raises:
        ModelError: under LongRoPE (Phi-3-128k, Phi-4-mini) one sample beyond the LLM's first context length would turn
            all samples of its batch to other frequencies: numbers would depend on who shares a batch.
    """
    rope = config.rope_parameters if hasattr(config, "rope_parameters") else None
    if rope is None or rope.get("rope_type") != "longrope":
        return
    limit = int(rope["original_max_position_embeddings"])
    if length > limit:
        raise ModelError(
            f"{config.model_type} with LongRoPE: a sample of {length} tokens; beyond {limit} its whole batch would be "
            f"turned to the frequencies of long contexts; set max_length of the stages to {limit}"
        )


def packed_row_length(config: PreTrainedConfig) -> int:
    """How long packed rows may get (``models.rows.arrange``): what flash and flex skip costs nothing, so all in one."""
    skips = "flash" in config._attn_implementation or config._attn_implementation == "flex_attention"
    return sys.maxsize if skips else DENSE_ROW


def attention_arguments(
    config: PreTrainedConfig,
    embeds_RKH: Tensor,
    visible_RK: Tensor,
    position_RK: Tensor,
    *,
    span: int,
    rows: Rows | None = None,
) -> dict[str, Any]:
    """Keyword arguments of the decoder's forward with which position q sees the visible keys k <= q of its sample.

    Args:
        config: the decoder's (text) configuration; its attention implementation decides about the masks' form.
        embeds_RKH: the pass's input; read for shape, type and device only.
        visible_RK: bool; False: nobody sees this key (padding, image tokens that are kept as readers only).
        position_RK: int64; original positions, by which sliding windows count; they may jump.
        span: positions of the original sequence at most, 0 where position ids do not jump inside a sample; at or under
            the window nobody's window needs counting.
        rows: which samples share rows; None: every row is one sample.

    Raises:
        ModelError: a sliding window is shorter than ``span`` under flash-attention, which can only count the positions
            that are there; or layers that nothing can part samples in (:func:`sliding_window`).
    """
    packed = rows is not None and rows.packed
    overflows = config._attn_implementation == "eager" and embeds_RKH.dtype == torch.float64
    window = sliding_window(config) if packed or span or overflows else None
    gaps = window is not None and span > window
    if "flash" in config._attn_implementation:
        if gaps:
            raise ModelError(
                f"{config.model_type} with {config._attn_implementation}: a sample of up to {span} tokens is longer "
                f"than the sliding window of {window}, which flash-attention would count without the image's tokens; "
                "set model.attention to sdpa or eager, or max_length to the window"
            )
        return _flash_arguments(visible_RK, rows)
    if not packed and not gaps and not (overflows and window is not None):
        return {"attention_mask": visible_RK.to(torch.int64)}
    sample_RK = rows.sample if rows is not None and packed else None
    return {"attention_mask": _masks(config, embeds_RKH, visible_RK, position_RK, window, sample_RK)}


def _flash_arguments(visible_RK: Tensor, rows: Rows | None) -> dict[str, Any]:
    """Boundaries are read only where the mask is all ones (it is dropped then); with padding it makes its own."""
    count, length = visible_RK.shape
    if rows is not None and rows.packed:
        assert count == 1, "packed rows with padding: flash-attention would take each row for one sample"
        boundaries = [0, *accumulate(rows.lengths)]
        longest = max(rows.lengths)
    else:
        boundaries = list(range(0, count * length + 1, length))
        longest = length
    boundaries_S1 = torch.tensor(boundaries, dtype=torch.int32, device=visible_RK.device)
    return {
        "attention_mask": visible_RK.to(torch.int64),
        "cu_seq_lens_q": boundaries_S1,
        "cu_seq_lens_k": boundaries_S1,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def _masks(
    config: PreTrainedConfig,
    embeds_RKH: Tensor,
    visible_RK: Tensor,
    position_RK: Tensor,
    window: int | None,
    sample_RK: Tensor | None,
) -> Any:
    """Explicit masks, one per kind of layer or the only one: windows count original positions, and with ``sample_RK`` a
    sample sees itself alone."""

    def full(row: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = (key <= query) & keys_RK[row, key]
        return seen if sample_RK is None else seen & (sample_RK[row, query] == sample_RK[row, key])

    def sliding(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        assert window is not None
        return full(row, head, query, key) & (position_RK[row, query] - position_RK[row, key] < window)

    # Padding is one more sample of its row: where nothing at all is seen, some kernels say NaN, and 0 * NaN is NaN too.
    keys_RK = visible_RK if sample_RK is None else visible_RK | (sample_RK < 0)
    if not _has_layer_types(config):  # Llama has no window; Mistral's every layer has it, or none
        return _mask(config, embeds_RKH, full if window is None else sliding)
    kinds = set(config.layer_types)
    return {kind: _mask(config, embeds_RKH, seen) for kind, seen in ((FULL, full), (SLIDING, sliding)) if kind in kinds}


def _mask(config: PreTrainedConfig, embeds_RKH: Tensor, seen: Callable[..., Tensor]) -> Any:
    """In the kernel's form: blocks for flex, to be added for eager, else bool [R, 1, K, K].

    transformers would make the same of such a function, but under vmap: 10 to 280 ms for a small batch on a CPU.
    """
    rows, length, device = embeds_RKH.shape[0], embeds_RKH.shape[1], embeds_RKH.device
    if config._attn_implementation == "flex_attention":
        return create_block_mask(seen, rows, None, length, length, device=device, _compile=True)
    row_R111 = torch.arange(rows, device=device).view(-1, 1, 1, 1)
    slot_K = torch.arange(length, device=device)
    seen_R1KK = seen(row_R111, None, slot_K.view(1, 1, -1, 1), slot_K.view(1, 1, 1, -1))
    if config._attn_implementation != "eager":
        return seen_R1KK
    lowest = torch.finfo(embeds_RKH.dtype).min
    return torch.zeros_like(seen_R1KK, dtype=embeds_RKH.dtype).masked_fill(~seen_R1KK, lowest)


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
