"""Settings of the training stages. Defaults are the paper's (method.md, table of stages)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from dpa.settings import Strict

ObjectiveName = Literal["uniform", "cal", "cmo", "prior", "spans"]
ParallelName = Literal["ddp", "fsdp", "zero2", "zero3"]


class StageSettings(Strict):
    """One stage of training."""

    objective: ObjectiveName | None = None
    """None: the method's."""
    minimum: float | None = Field(default=None, ge=0)
    """Lower bound of a token's weight (delta_min); None: the objective's."""
    maximum: float | None = Field(default=None, gt=0)
    """Upper bound of a token's weight (delta_max); None: the objective's."""
    window: int | None = Field(default=None, ge=1)
    """Width in tokens of the moving mean over weights; odd. None: the objective's (3; prior and spans: 1, no mean)."""
    text_only: Literal["mean", "minimum", "zero"] = "mean"
    """Weight of tokens of samples without image (method.md, deviations)."""
    text_positions: Literal["original", "contiguous"] = "original"
    """Position ids of the text-only pass: kept, or renumbered."""
    text_cache: bool | None = None
    """Text-only log-probs from a cache on disk, filled before the first step and shared by all runs with the same LLM,
    proxy and data; only where the LLM is frozen (``wants_text_cache``). None: where the stage reads all of its data."""
    format: Literal["plain", "chat"] = "plain"
    image_mode: Literal["crop", "pad"] = "crop"
    """``crop``: resize and centre crop; ``pad``: pad to a square with the mean colour, then resize."""
    max_length: int = Field(default=2048, ge=8)
    """Tokens, image placeholders included; text beyond it is cut, an image never."""
    learning_rate: float = Field(gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    warmup_ratio: float = Field(default=0.03, ge=0, lt=1)
    """Share of the steps with linear warm-up; cosine to 0 after it."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    epochs: float = Field(default=1.0, gt=0)
    max_steps: int | None = Field(default=None, ge=1)
    """Optimizer steps; overrides ``epochs``."""
    global_batch: int = Field(default=256, ge=1)
    """Samples per optimizer step over all ranks."""
    micro_batch: int = Field(default=16, ge=1)
    """Samples per forward on one rank."""
    packing: bool | None = None
    """Several samples in a row of a pass, none of which sees another: hardly any padding, none with flash_attention_2
    and flex_attention. None: on with fidelity ``exact``, off with ``official``, which reads the padded batch."""
    tokens_per_micro_batch: int | None = Field(default=None, ge=1)
    """Tokens per forward on one rank, image placeholders included; a longer sample goes alone. Takes the place of
    ``micro_batch`` and needs packing. None: ``micro_batch`` samples, whatever their length."""
    group_by_length: bool = False
    """Micro-batches of similar length (stage 3 of the reference)."""
    gradient_checkpointing: bool = False
    save_steps: int = Field(default=200, ge=1)
    """Optimizer steps between saved states."""

    @property
    def reads_everything(self) -> bool:
        """Every sample at least once, as far as settings alone say it."""
        return self.max_steps is None and self.epochs >= 1


class TrainSettings(Strict):
    """What all stages share."""

    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """``auto``: bf16 on accelerators that have it, fp32 elsewhere. Trainable weights and optimizer states stay fp32."""
    keep_states: int = Field(default=2, ge=2)
    """Saved states kept per stage; two, so that a broken last one has a predecessor."""
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ("tensorboard",)
    """metrics.jsonl is always written."""
    deterministic: bool | None = None
    """None: on for the CPU, off elsewhere."""
    timeout_minutes: float = Field(default=30.0, gt=0)
    """Ranks wait for each other within a step as long as this, then the run ends. (A rank that dies ends it at
    once.)"""
    compile: bool = False
    """torch.compile for the LLM's layers. Off until it is shown to pay: compiling takes a while in every stage
    (docs/performance.md). Needs a C++ compiler on a CPU, Triton on CUDA; not with fidelity official."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads; None: torch's own choice. Bit-identical continuation needs the same number."""
    vision_cache: bool = False
    """The frozen tower's features from a cache on disk (stages 2 and 3), filled before the first step: no image is
    decoded after that. float16, so results differ a little. 2 bytes x images x rows x channels: 1.2 MB an image for
    CLIP-L at 336 pixels. Pays for small LLMs and many epochs."""
