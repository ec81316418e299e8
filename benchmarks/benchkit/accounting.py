"""FLOPs and bytes of a step, counted from shapes. Projections, not measurements: each says what it assumes.

FLOPs: 2 per multiply-add of matrix products; attention counts the causal half; norms, activations, softmaxes are left
out. Bytes: weights and states, what autograd keeps of an eager Qwen2 layer, and the largest transient tensors;
allocator and CUDA context are left out. ``tests/unit/benchmarks`` holds the counted parameters against real models,
docs/performance.md the counted peaks against measured ones.

Legend: B samples, T = B * L positions, N supervised tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from benchkit.shapes import LlmSize, Shape
from dpa.objectives.logprob import ACCELERATOR_TILE, CPU_TILE

ROWS = ("vanilla", "official", "ours")

H100_FLOPS = 989e12
"""Dense bf16, data sheet (SXM)."""
H100_BANDWIDTH = 3.35e12
"""Bytes per second, data sheet (SXM)."""
H100_BYTES = 80e9
ACHIEVED = 0.5
"""Assumed share of ``H100_FLOPS`` that matrix products reach, in all rows alike."""

REFERENCE_LOGIT_TENSORS = 5
"""float32 [T, V] alive at once in the reference's loss: logits, shifted copy, its softmax, and two without image."""
REFERENCE_LOGIT_TRAFFIC = 22.5
"""How often the reference's loss reads or writes one float32 [T, V], forward and backward (one per read, one per
write; bf16 is half)."""

_BF16, _FP32 = 2, 4
_ADAM = 3 * _FP32
"""Gradient and two moments of a trained number."""


def layer_parameters(llm: LlmSize) -> int:
    """Matrices of one decoder layer (biases and norms are negligible)."""
    kv = llm.hidden // llm.heads * llm.kv_heads
    return 2 * llm.hidden**2 + 2 * llm.hidden * kv + 3 * llm.hidden * llm.intermediate


def tower_parameters(shape: Shape) -> int:
    """Matrices of the layers of the vision tower that run."""
    tower = shape.tower
    return tower.layers * (4 * tower.hidden**2 + 2 * tower.hidden * tower.intermediate)


def connector_parameters(shape: Shape) -> int:
    return shape.tower.hidden * shape.llm.hidden + shape.llm.hidden**2


def lora_parameters(shape: Shape) -> int:
    llm, kv = shape.llm, shape.llm.hidden // shape.llm.heads * shape.llm.kv_heads
    ends = 4 * llm.hidden + 2 * (llm.hidden + kv) + 3 * (llm.hidden + llm.intermediate)
    return llm.layers * shape.lora_rank * ends


@dataclass(frozen=True, slots=True)
class _Counts:
    """Of one micro-batch."""

    samples: int
    length: int
    text: int
    supervised: int

    @property
    def positions(self) -> int:
        return self.samples * self.length


def _counts(shape: Shape, stage: int) -> _Counts:
    samples = shape.micro_batch[stage - 1]
    return _Counts(samples, shape.length(stage), shape.text_tokens(stage), samples * shape.supervised_tokens(stage))


def flops(shape: Shape, stage: int, row: str, *, checkpointing: bool = False) -> dict[str, float]:
    """FLOPs of one micro-batch by part, with their ``total``."""
    llm, n = shape.llm, _counts(shape, stage)
    linear = 2.0 * llm.layers * layer_parameters(llm) * n.positions
    attention = 2.0 * llm.layers * llm.hidden * n.samples * n.length**2
    forward = linear + attention
    backward = linear + 2 * attention + (forward if checkpointing else 0.0)
    if stage == 3:
        backward += linear
    if stage == 1:  # LoRA's own products, forward and twice backward
        lora = 2.0 * lora_parameters(shape) * n.positions
        forward, backward = forward + lora, backward + 2 * lora + (lora if checkpointing else 0.0)
    per_row = 2.0 * llm.hidden * llm.vocabulary
    trained_head = stage == 3
    parts = {"tower_connector": 0.0, "pass": forward, "text_only_pass": 0.0, "backward": backward}
    if row == "official":
        parts["head"] = (3.0 if trained_head else 2.0) * per_row * n.positions
        if stage > 1:
            parts["text_only_pass"] = forward + per_row * n.positions
    else:
        parts["head"] = (4.0 if trained_head else 2.0) * per_row * n.supervised
        if row == "ours" and stage > 1:
            text_positions = n.samples * n.text
            parts["text_only_pass"] = (
                2.0 * llm.layers * layer_parameters(llm) * text_positions
                + 2.0 * llm.layers * llm.hidden * n.samples * n.text**2
                + per_row * n.supervised
            )
    if stage > 1:
        tower, rows = shape.tower, shape.tower.image_tokens + 1
        parts["tower_connector"] = n.samples * (
            2.0 * tower_parameters(shape) * rows
            + 4.0 * tower.layers * tower.hidden * rows**2
            + 2.0 * connector_parameters(shape) * tower.image_tokens
        )
        parts["backward"] += n.samples * 4.0 * connector_parameters(shape) * tower.image_tokens
    return parts | {"total": sum(parts.values())}


def peak_bytes(
    shape: Shape, stage: int, row: str, *, checkpointing: bool = False, number: int = _BF16, on_cpu: bool = False
) -> dict[str, float]:
    """Bytes by part at the step's peak, with their ``total``; ``resident``: what of it is there before the step.

    Args:
        number: bytes of a number in frozen weights and activations: 2 (bf16) or 4.
        on_cpu: tiles of the CPU path.
    """
    llm, n = shape.llm, _counts(shape, stage)
    frozen, trained = _parameters(shape, stage)
    kept_layer = _kept_by_layer(llm, number, trained=stage == 3) * n.positions
    boundary = llm.hidden * number * n.positions
    kept = llm.layers * (boundary if checkpointing else kept_layer)
    transient = kept_layer if checkpointing else 3.0 * llm.intermediate * number * n.positions
    rows, columns = CPU_TILE if on_cpu else ACCELERATOR_TILE
    if row == "official":
        head = REFERENCE_LOGIT_TENSORS * float(_FP32) * n.positions * llm.vocabulary
    else:
        tiles = 2.0 * _FP32 * min(rows, n.supervised) * min(columns, llm.vocabulary)
        head = tiles + n.supervised * llm.hidden * (number + _FP32)
        if stage == 3:
            head += float(_FP32) * llm.hidden * min(columns, llm.vocabulary)
    pixels = 0 if stage == 1 else n.samples * 3 * shape.tower.side**2 * _FP32
    parts = {
        "frozen_weights": float(number * frozen),
        "trained_weights_and_states": float((_FP32 + _ADAM) * trained),
        "pixels": float(pixels),
        "kept_for_backward": kept,
        # the head's transients are gone before the first layer's backward begins
        "largest_transient": max(head, transient),
    }
    if stage == 3 and number == _BF16:
        parts["autocast_copies"] = float(number * trained)
    resident = parts["frozen_weights"] + parts["trained_weights_and_states"] + parts["pixels"]
    return parts | {"head": head, "resident": resident, "total": sum(parts.values())}


def _parameters(shape: Shape, stage: int) -> tuple[int, int]:
    """(frozen, trained)."""
    llm = shape.llm
    embeddings = llm.vocabulary * llm.hidden * (1 if llm.tied else 2)
    language = llm.layers * layer_parameters(llm) + embeddings
    if stage == 1:
        return language, lora_parameters(shape)
    if stage == 2:
        return language + tower_parameters(shape), connector_parameters(shape)
    return tower_parameters(shape), language + connector_parameters(shape)


def _kept_by_layer(llm: LlmSize, number: int, *, trained: bool) -> float:
    """Bytes per position that autograd keeps of an eager Qwen2 layer.

    Two norms keep their float32 input; attention queries, keys, values and its output; the gated MLP three tensors of
    its inner width. A frozen matrix keeps nothing, a trained one its input.
    """
    kv = llm.hidden // llm.heads * llm.kv_heads
    kept = 2 * llm.hidden * _FP32 + (2 * llm.hidden + 2 * kv) * number + 3 * llm.intermediate * number
    if trained:  # each norm's output before and after its weight, and the inputs of the last products
        kept += (4 * llm.hidden + llm.hidden + llm.intermediate) * number
    return float(kept)


def projection(shape: Shape, stage: int) -> dict[str, Any]:
    """All rows' FLOPs and bytes, and for GPU shapes the figure that counts."""
    result: dict[str, Any] = {
        "shape": shape.name,
        "stage": stage,
        "micro_batch": shape.micro_batch[stage - 1],
        "flops": {row: flops(shape, stage, row) for row in ROWS},
        "flops_with_checkpointing": {row: flops(shape, stage, row, checkpointing=True) for row in ROWS},
    }
    if shape.on_gpu:
        result["bytes"] = {row: peak_bytes(shape, stage, row) for row in ROWS}
        result["bytes_with_checkpointing"] = {row: peak_bytes(shape, stage, row, checkpointing=True) for row in ROWS}
        result["figure_that_counts"] = figure_that_counts(shape, stage)
    return result


def figure_that_counts(shape: Shape, stage: int) -> dict[str, Any]:
    """PROJECTED: samples per second of ours at its best over the reference's own settings, both in 80 GB.

    The reference: its micro-batch, checkpointing on. Ours: the largest halving of that micro-batch that fits without
    checkpointing, else with it. Both at ``ACHIEVED``; the reference's loss moves its logits at full bandwidth.
    """
    reference_flops = flops(shape, stage, "official", checkpointing=True)["total"]
    samples = shape.micro_batch[stage - 1]
    traffic = REFERENCE_LOGIT_TRAFFIC * _FP32 * samples * shape.length(stage) * shape.llm.vocabulary
    products = reference_flops / (ACHIEVED * H100_FLOPS)
    reference_seconds = (products + traffic / H100_BANDWIDTH) / samples
    for checkpointing, micro_batch in [(False, samples >> k) for k in range(samples.bit_length())] + [(True, samples)]:
        ours = shape.varied(stage=stage, micro_batch=micro_batch, caption=None)
        memory = peak_bytes(ours, stage, "ours", checkpointing=checkpointing)["total"]
        if memory <= H100_BYTES:
            break
    ours_flops = flops(ours, stage, "ours", checkpointing=checkpointing)["total"]
    ours_seconds = ours_flops / (ACHIEVED * H100_FLOPS) / micro_batch
    return {
        "projected": True,
        "assumes": f"{ACHIEVED:.0%} of {H100_FLOPS:.3g} FLOP/s in both, {H100_BANDWIDTH:.3g} bytes/s",
        "reference_seconds_per_sample": reference_seconds,
        "reference_peak_bytes": peak_bytes(shape, stage, "official", checkpointing=True)["total"],
        "ours_micro_batch": micro_batch,
        "ours_checkpointing": checkpointing,
        "ours_seconds_per_sample": ours_seconds,
        "ours_peak_bytes": memory,
        "ours_fits": memory <= H100_BYTES,
        "speed_up": reference_seconds / ours_seconds,
        "speed_up_from_products_alone": products / samples / ours_seconds,
    }
