"""FLOPs and bytes of a micro-batch, counted from sizes. Counts, not measurements; what they leave out is said.

FLOPs: 2 per multiply-add of matrix products; attention counts the causal half; norms, activations, softmaxes are left
out. Bytes: weights and states, what autograd keeps of eager layers, the largest transient tensors; the allocator's
fragments and the device's context are left out. ``benchmarks/plan.py`` holds the counted peaks against measured ones.

Legend: T positions of a micro-batch, N supervised tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dpa.objectives.logprob import ACCELERATOR_TILE, CPU_COLUMNS, CPU_TILE
from dpa.plan.shapes import LlmShape, TowerShape
from dpa.recipe import StageName
from dpa.train.settings import ParallelName

Row = Literal["vanilla", "ours", "official"]
"""Which passes a step makes: none without image, ours, the reference's (full-length second pass, logits everywhere)."""

REFERENCE_LOGIT_TENSORS = 5
"""float32 [T, V] alive at once in the reference's loss: logits, shifted copy, its softmax, and two without image."""

BF16, FP32 = 2, 4
_MOMENTS = 2 * FP32


@dataclass(frozen=True, slots=True)
class Load:
    """One micro-batch."""

    images: float
    positions: float
    """T: all tokens of the pass with image, what is padded included."""
    text: float
    """Of these, no image placeholders, in samples with image: what the text-only pass reads."""
    supervised: float
    """N."""
    squares: float
    """Sum of the samples' lengths squared: what attention costs."""
    text_squares: float
    longest: float
    """Row of the pass; what attention that keeps its probabilities keeps."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """The model under a stage."""

    llm: LlmShape
    tower: TowerShape
    lora: int
    """Numbers in the adapter (stage 1)."""
    lora_rank: int
    connector: int
    """Numbers in the connector."""
    llm_parameters: int
    tower_parameters: int

    def parameters(self, stage: StageName) -> tuple[int, int]:
        """(frozen, trained) numbers of a stage (method, table of stages)."""
        if stage == "proxy":
            return self.llm_parameters, self.lora
        if stage == "pretrain":
            return self.llm_parameters + self.tower_parameters, self.connector
        return self.tower_parameters, self.llm_parameters + self.connector


def flops(sizes: Sizes, stage: StageName, row: Row, load: Load, *, checkpointing: bool) -> dict[str, float]:
    """FLOPs of one micro-batch by part, with their ``total``."""
    llm = sizes.llm
    linear = 2.0 * llm.layers * llm.layer * load.positions
    attention = 2.0 * llm.layers * llm.query * load.squares
    forward = linear + attention
    backward = linear + 2 * attention + (forward if checkpointing else 0.0)
    if stage == "finetune":
        backward += linear
    if stage == "proxy":  # LoRA's own products, forward and twice backward
        lora = 2.0 * sizes.lora * load.positions
        forward, backward = forward + lora, backward + 2 * lora + (lora if checkpointing else 0.0)
    per_row = 2.0 * llm.hidden * llm.vocabulary
    trained_head = stage == "finetune"
    parts = {"tower_connector": 0.0, "pass": forward, "text_only_pass": 0.0, "backward": backward}
    if row == "official":
        parts["head"] = (3.0 if trained_head else 2.0) * per_row * load.positions
        if stage != "proxy":
            parts["text_only_pass"] = forward + per_row * load.positions
    else:
        parts["head"] = (4.0 if trained_head else 2.0) * per_row * load.supervised
        if row == "ours" and stage != "proxy" and load.images:
            parts["text_only_pass"] = (
                2.0 * llm.layers * llm.layer * load.text
                + 2.0 * llm.layers * llm.query * load.text_squares
                + per_row * load.supervised
            )
    if stage != "proxy":
        tower, rows = sizes.tower, sizes.tower.image_tokens + 1
        through = 2.0 * sizes.connector * tower.image_tokens
        parts["tower_connector"] = load.images * (
            2.0 * tower.matrices * rows + 4.0 * tower.layers * tower.hidden * rows**2 + through
        )
        parts["backward"] += load.images * 2.0 * through
    return parts | {"total": sum(parts.values())}


def head_bytes(sizes: Sizes, stage: StageName, row: Row, load: Load, *, number: int, on_cpu: bool) -> float:
    """Largest transient of head and loss."""
    llm = sizes.llm
    if row == "official":
        return REFERENCE_LOGIT_TENSORS * float(FP32) * load.positions * llm.vocabulary
    rows, columns = CPU_TILE if on_cpu else ACCELERATOR_TILE
    if on_cpu:
        columns = min(columns * max(1, rows // max(1, int(load.supervised))), CPU_COLUMNS)
    tiles = 2.0 * FP32 * min(rows, load.supervised) * min(columns, llm.vocabulary)
    found = tiles + load.supervised * llm.hidden * (number + FP32)
    if stage == "finetune":
        found += float(FP32) * llm.hidden * min(columns, llm.vocabulary)
    return found


def peak_bytes(
    sizes: Sizes,
    stage: StageName,
    row: Row,
    load: Load,
    *,
    checkpointing: bool,
    number: int = BF16,
    on_cpu: bool = False,
    parallel: ParallelName = "ddp",
    ranks: int = 1,
    accumulates: bool = True,
    reference: bool = False,
) -> dict[str, float]:
    """Bytes per device by part at a step's peak, with their ``total``; ``resident``: of it what is there between steps.

    Args:
        number: bytes of a number in frozen weights and activations: 2 (bf16) or 4.
        on_cpu: tiles of the CPU path.
        parallel: what ranks share: nothing (ddp), gradients and moments (zero2: the weights are shards between steps
            and whole within them), weights, too (fsdp, zero3).
        ranks: devices.
        accumulates: a step has several micro-batches, so that all gradients are there when activations peak. With a
            single one only the head's and the last layer's are, and the others come as activations go.
        reference: a second, frozen LLM stands beside the model (objective ``prior`` in stage 3), whole on every device.
    """
    frozen, trained = sizes.parameters(stage)
    if stage != "finetune":
        parallel = "ddp"  # a frozen LLM is whole on every rank: nothing is sent in a step
    shared = 1.0 if parallel == "ddp" else 1.0 / ranks
    kept, recomputed = activation_bytes(sizes, stage, load, checkpointing=checkpointing, number=number)
    parts = {
        "weights": number * frozen + shared * FP32 * trained,
        "gradients": shared * FP32 * trained,
        "optimizer": shared * _MOMENTS * trained,
        "activations": kept,
        # the head's transients are gone before the first layer's backward begins: the MLP's gradients, on top of what a
        # layer keeps where it is computed again
        "transients": max(
            head_bytes(sizes, stage, row, load, number=number, on_cpu=on_cpu),
            recomputed + 3.0 * sizes.llm.intermediate * number * load.positions,
        ),
    }
    if reference:
        parts["reference"] = float(number * sizes.llm_parameters)
    if stage == "finetune" and number == BF16 and shared == 1.0:
        parts["autocast copies"] = float(number * sizes.llm_parameters)
    if shared < 1.0:  # all layers or two at a time, and the embeddings with the head
        llm = sizes.llm
        layers = llm.layers if parallel == "zero2" else 2
        parts["gathered layers"] = float(
            number * layers * llm.layer + FP32 * llm.vocabulary * llm.hidden * (1 if llm.tied else 2)
        )
    pixels = 0.0 if stage == "proxy" else load.images * 3 * sizes.tower.side**2 * FP32
    parts["batch"] = pixels + load.positions * 40.0  # ids, positions and masks
    if stage == "finetune" and not accumulates:
        llm = sizes.llm
        early = (llm.layer + llm.vocabulary * llm.hidden) / sizes.llm_parameters
        moving = parts["activations"] + parts["transients"]
        parts["gradients"] = max(parts["gradients"] * min(1.0, early), parts["gradients"] - moving)
    resident = parts["weights"] + parts["optimizer"] + parts.get("reference", 0.0)
    return parts | {"resident": resident, "total": sum(parts.values())}


def activation_bytes(
    sizes: Sizes, stage: StageName, load: Load, *, checkpointing: bool, number: int
) -> tuple[float, float]:
    """(kept from forward to backward, of one layer while it is recomputed)."""
    llm, tower = sizes.llm, sizes.tower
    layer = _kept_by_layer(sizes, stage, number) * load.positions
    if llm.eager:
        layer += llm.heads * load.longest * load.positions * (number + FP32)
    boundary = llm.hidden * number * load.positions
    kept = llm.layers * (boundary if checkpointing else layer)
    if stage != "proxy":  # the connector's input, its inner width before and after GELU, and what is spliced
        kept += load.images * tower.image_tokens * (tower.hidden + 3 * llm.hidden) * number
    return kept, layer if checkpointing else 0.0


def _kept_by_layer(sizes: Sizes, stage: StageName, number: int) -> float:
    """Bytes per position that autograd keeps of an eager layer.

    Two norms keep their float32 input; attention queries, keys, values and its output; the gated MLP three tensors of
    its inner width. A frozen matrix keeps nothing, a trained one its input; an adapter its input and its inner width.
    """
    llm = sizes.llm
    kept = 2 * llm.hidden * FP32 + (2 * llm.query + 2 * llm.key) * number + 3 * llm.intermediate * number
    if stage == "finetune":  # each norm's output before and after its weight, and the inputs of the last products
        kept += (4 * llm.hidden + llm.query + llm.intermediate) * number
    if stage == "proxy":
        kept += (2 * llm.hidden + llm.query + llm.intermediate + 7 * sizes.lora_rank) * number
    return float(kept)
