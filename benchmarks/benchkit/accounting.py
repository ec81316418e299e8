"""FLOPs and bytes of a benchmark's step, counted from shapes by ``dpa.plan.count``. Projections, not measurements."""

from __future__ import annotations

from typing import Any

from benchkit.shapes import STAGES, LlmSize, Shape
from dpa.plan.count import BF16, FP32, Load, Row, Sizes
from dpa.plan.count import flops as counted_flops
from dpa.plan.count import peak_bytes as counted_bytes
from dpa.plan.shapes import LlmShape, TowerShape

ROWS: tuple[Row, ...] = ("vanilla", "official", "ours")

H100_FLOPS = 989e12
"""Dense bf16, data sheet (SXM)."""
H100_BANDWIDTH = 3.35e12
"""Bytes per second, data sheet (SXM)."""
H100_BYTES = 80e9
ACHIEVED = 0.5
"""Assumed share of ``H100_FLOPS`` that matrix products reach, in all rows alike."""

REFERENCE_LOGIT_TRAFFIC = 22.5
"""How often the reference's loss reads or writes one float32 [T, V], forward and backward (one per read, one per
write; bf16 is half)."""


def sizes_of(shape: Shape) -> Sizes:
    """What counting reads of a shape."""
    llm, tower = _llm(shape.llm), shape.tower
    seen = TowerShape(tower.hidden, tower.intermediate, tower.layers, tower.image_tokens, tower.side)
    connector = tower.hidden * llm.hidden + llm.hidden**2
    return Sizes(llm, seen, llm.lora(shape.lora_rank), shape.lora_rank, connector, llm.matrices, seen.matrices)


def load_of(shape: Shape, stage: int) -> Load:
    """The shape's micro-batch: samples of one length."""
    samples, length, text = shape.micro_batch[stage - 1], shape.length(stage), shape.text_tokens(stage)
    return Load(
        images=0 if stage == 1 else samples,
        positions=samples * length,
        text=samples * text,
        supervised=samples * shape.supervised_tokens(stage),
        squares=samples * length**2,
        text_squares=samples * text**2,
        longest=length,
    )


def flops(shape: Shape, stage: int, row: Row, *, checkpointing: bool = False) -> dict[str, float]:
    """FLOPs of one micro-batch by part, with their ``total``."""
    return counted_flops(sizes_of(shape), STAGES[stage], row, load_of(shape, stage), checkpointing=checkpointing)


def peak_bytes(
    shape: Shape,
    stage: int,
    row: Row,
    *,
    checkpointing: bool = False,
    number: int = BF16,
    on_cpu: bool = False,
    accumulates: bool = True,
) -> dict[str, float]:
    """Bytes by part at the step's peak, with their ``total``; ``resident``: what of it is there before the step."""
    return counted_bytes(
        sizes_of(shape),
        STAGES[stage],
        row,
        load_of(shape, stage),
        checkpointing=checkpointing,
        number=number,
        on_cpu=on_cpu,
        accumulates=accumulates,
    )


def _llm(llm: LlmSize) -> LlmShape:
    return LlmShape(
        hidden=llm.hidden,
        intermediate=llm.intermediate,
        layers=llm.layers,
        heads=llm.heads,
        kv_heads=llm.kv_heads,
        head_dim=llm.hidden // llm.heads,
        vocabulary=llm.vocabulary,
        tied=llm.tied,
    )


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
    traffic = REFERENCE_LOGIT_TRAFFIC * FP32 * samples * shape.length(stage) * shape.llm.vocabulary
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
