"""``dpa export``: write, read back, compare, and only then publish."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, PreTrainedTokenizerFast

from dpa.errors import ModelError, UserError
from dpa.export import llava, peft
from dpa.export.card import hub_id, public, write_card
from dpa.export.conversation import find_conversation
from dpa.export.origin import Gate, Origin, check_start, check_weights, origin_of
from dpa.export.probe import (
    TEMPLATE,
    Probe,
    check_logits,
    check_template,
    check_trained_ids,
    compare,
    make_probe,
    served_logits,
    trained_logits,
)
from dpa.export.weights import dtype_of, round_to
from dpa.models.checkpoint_io import SHARD_SIZE, load_checkpoint, save_checkpoint
from dpa.models.foreign import checkpoint_folder
from dpa.models.vlm import Vlm
from dpa.store import disk_errors

Layout = Literal["hf", "llava", "peft"]
LAYOUTS: tuple[Layout, ...] = ("hf", "llava", "peft")


@dataclass(frozen=True, slots=True)
class Export:
    """What ``dpa export`` prints."""

    checkpoint: str
    layout: Layout
    out: Path
    gates: tuple[Gate, ...]
    facts: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        files = sorted(path for path in self.out.rglob("*") if path.is_file())
        return {
            "checkpoint": self.checkpoint,
            "to": self.layout,
            "out": str(self.out),
            "gates": [gate.to_dict() for gate in self.gates],
            **self.facts,
            "files": {str(path.relative_to(self.out)): path.stat().st_size for path in files},
        }

    def text(self) -> str:
        """For people."""
        gates = [f"{gate.state:8} {gate.name}: {gate.detail}" for gate in self.gates]
        facts = [f"{name}: {value}" for name, value in self.facts.items() if value is not None]
        return "\n".join([*gates, *facts, str(self.out)])


@dataclass(frozen=True, slots=True)
class _Work:
    """A checkpoint on its way."""

    origin: Origin
    vlm: Vlm
    """Stored weights rounded to ``dtype``, in float32."""
    dtype: torch.dtype
    probe: Probe
    before: list[Tensor]
    rounding: str | None
    """What rounding does to the logits; None where nothing is rounded."""
    temporary: Path
    out: Path
    shard_size: str
    tower: str | None


def export_checkpoint(
    checkpoint: str,
    *,
    to: str,
    out: Path | None = None,
    dtype: str | None = None,
    shard_size: str = SHARD_SIZE,
    tower: str | None = None,
) -> Export:
    """Writes a checkpoint in another layout; what does not pass every gate is removed again.

    Args:
        checkpoint: a run's folder, a checkpoint's, a hub id; for ``peft`` a run's, its proxy's.
        to: ``hf``, ``llava`` or ``peft``.
        out: must not exist or be empty; None: ``CHECKPOINT.LAYOUT`` beside the checkpoint.
        dtype: ``bf16``, ``fp16``, ``fp32``; None: as stored.
        shard_size: of a weight file at most (``5GB``, ``200MB``).
        tower: for ``llava``: hub id to write as ``mm_vision_tower``; None: the folder that is written beside.

    Raises:
        UserError: wrong input.
        CheckpointError: a gate failed; nothing was written.
    """
    if to not in LAYOUTS:
        raise UserError(f"--to {to}: no such layout; choose {', '.join(LAYOUTS)}")
    if to == "peft":
        return _export_peft(checkpoint, out)
    given = _checkpoint_of(checkpoint)
    target = _target(given if given.exists() else Path(checkpoint.replace("/", "--")), to, out)
    origin = origin_of(given if given.exists() else checkpoint_folder(checkpoint))
    proofs = (check_start(origin), check_weights(origin))
    temporary = target.with_name(f"{target.name}.tmp")
    work = _prepare(origin, dtype, temporary, target, shard_size, tower)
    return _publish(checkpoint, "hf" if to == "hf" else "llava", work, proofs)


def _checkpoint_of(checkpoint: str) -> Path:
    """A run's folder stands for its main method's checkpoint."""
    path = Path(checkpoint)
    if (path / "recipe.yaml").is_file() and not (path / "config.json").is_file():
        if not (path / "checkpoint").exists():
            raise ModelError(f"run {path} has no checkpoint yet: stage 3 is not finished")
        return path / "checkpoint"
    return path


def _target(given: Path, to: str, out: Path | None) -> Path:
    target = given.with_name(f"{given.name}.{to}") if out is None else out
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} is there already; remove it, or choose another --out")
    return target


def _prepare(
    origin: Origin, dtype: str | None, temporary: Path, out: Path, shard_size: str, tower: str | None
) -> _Work:
    vlm = load_checkpoint(origin.checkpoint)
    chosen = dtype_of(dtype, vlm.model)
    torch.nn.Module.float(vlm.model)
    probe = make_probe(vlm)
    stored = trained_logits(vlm, probe)
    round_to(vlm.model, chosen)
    before = trained_logits(vlm, probe)
    difference, rounding = compare(stored, before), None
    if difference.largest:
        rounding = (
            f"rounding to {str(chosen).removeprefix('torch.')} moves logits of up to {difference.scale:.3g} by at most "
            f"{difference.largest:.2e}; the most probable token stays at {difference.same_choice:.1%} of positions"
        )
    return _Work(origin, vlm, chosen, probe, before, rounding, temporary, out, shard_size, tower)


def _publish(checkpoint: str, layout: Literal["hf", "llava"], work: _Work, proofs: tuple[Gate, ...]) -> Export:
    llava.remove(work.temporary)
    write: Callable[[_Work, tuple[Gate, ...]], tuple[tuple[Gate, ...], dict[str, Any]]]
    write = _write_hf if layout == "hf" else _write_llava
    try:
        with disk_errors(work.out):
            gates, facts = write(work, proofs)
            _move(work.temporary, work.out)
    except BaseException:
        llava.remove(work.temporary)
        raise
    return Export(checkpoint, layout, work.out, gates, {"rounding": work.rounding, **facts})


def _move(temporary: Path, out: Path) -> None:
    if out.is_dir():
        out.rmdir()  # empty, or it would have been refused
    os.replace(temporary, out)


def _write_hf(work: _Work, proofs: tuple[Gate, ...]) -> tuple[tuple[Gate, ...], dict[str, Any]]:
    vlm, folder = work.vlm, work.temporary
    said = _end_at_turns(vlm)
    save_checkpoint(vlm, folder, dtype=work.dtype, shard_size=work.shard_size)
    model = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, attn_implementation={"": "eager", "text_config": vlm.family.attention}
    )
    after = served_logits(torch.nn.Module.eval(model), work.probe)
    del model
    gates = (
        *proofs,
        check_logits(work.before, after, "transformers' AutoModelForImageTextToText"),
        check_template(folder, vlm, work.origin, work.probe),
    )
    how = (
        "A `LlavaForConditionalGeneration` of transformers: `AutoModelForImageTextToText.from_pretrained(...)` and "
        '`AutoProcessor.from_pretrained(..., backend="pil")`. vLLM and others: docs/serving.md of dpa.'
    )
    recipe = work.origin.recipe
    base = (
        () if recipe is None else (hub_id(recipe["model"].get(name)) for name in ("start_from", "llm", "vision_tower"))
    )
    notes = [note for note in (said, _attention_note(vlm), work.rounding and _sentence(work.rounding)) if note]
    write_card(folder, title=work.out.name, how=how, origin=work.origin, gates=gates, base=tuple(base), notes=notes)
    return gates, {"dtype": str(work.dtype).removeprefix("torch.")}


def _end_at_turns(vlm: Vlm) -> str | None:
    """Makes the end of a turn the tokenizer's end of text, as chat models have it: lmms-eval stops there alone."""
    tokenizer, end = vlm.tokenizer, vlm.rules.end_of_turn
    if tokenizer.eos_token == end or "eos_token" in vlm.rules.chat_template:
        return None
    before, tokenizer.eos_token = tokenizer.eos_token, end
    return f"The tokenizer's `eos_token` is `{end}`, the end of a turn (in training's checkpoint: `{before}`)."


def _attention_note(vlm: Vlm) -> str | None:
    if vlm.family.attention == "sdpa":
        return None
    return (
        "Its attention has a soft-cap that sdpa leaves out: pass "
        '`attn_implementation={"text_config": "eager"}`. Load it with transformers 5: transformers 4 and vLLM scale '
        "Gemma-2's image features as if they were words (docs/serving.md of dpa)."
    )


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def _write_llava(work: _Work, proofs: tuple[Gate, ...]) -> tuple[tuple[Gate, ...], dict[str, Any]]:
    vlm, folder = work.vlm, work.temporary
    row = llava.class_of(vlm)
    final = work.out.resolve()
    llava.write_llava(vlm, folder, dtype=work.dtype, tower=work.tower, final=final, shard_size=work.shard_size)
    again = llava.read_llava(folder, image_token_id=vlm.rules.image_token_id)
    after = served_logits(again, work.probe)
    del again
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    found = find_conversation(work.probe.conversations, tokenizer)
    said = check_trained_ids(work.origin, work.probe)
    if found is None:
        match = Gate(TEMPLATE, "unknown", f"no conv-mode that is known here writes this prompt; {said}")
        serve = (
            "No conversation of LLaVA's `conv_templates` writes the prompt that was trained: render prompts with this "
            "folder's own `tokenizer.apply_chat_template(..., tokenize=False)`, not with a conv-mode."
        )
    else:
        match = Gate(TEMPLATE, "passed", f"conv-mode {found.name} ({found.where}) gives training's ids; {said}")
        serve = f"Serve it with `--conv-mode {found.name}` ({found.where})."
    gates = (*proofs, check_logits(work.before, after, "dpa's own reader of this layout"), match)
    how = (
        f"`{row.architecture}` of {row.where}, with `mm_projector.bin` beside the weights. The name of the folder must "
        f"hold `llava` and, for LLaVA-NeXT, the LLM's kind (`llama`, `qwen`, `mistral`). {serve}"
    )
    moved = (
        f"The vision tower lies in `{llava.TOWER_FOLDER}`; `mm_vision_tower` in config.json is its absolute path: "
        "change it when the folder moves."
    )
    notes = [note for note in (None if work.tower else moved, work.rounding and _sentence(work.rounding)) if note]
    write_card(folder, title=work.out.name, how=how, origin=work.origin, gates=gates, notes=notes)
    facts = {"class": row.architecture, "conv_mode": None if found is None else found.name}
    return gates, {"dtype": str(work.dtype).removeprefix("torch."), **facts}


def _export_peft(checkpoint: str, out: Path | None) -> Export:
    adapter = peft.find_adapter(Path(checkpoint))
    target = _target(adapter, "peft", out)
    temporary = target.with_name(f"{target.name}.tmp")
    llava.remove(temporary)
    try:
        with disk_errors(target):
            base = peft.write_peft(adapter, temporary)
            gates = (peft.check_base(adapter, base), peft.check_merged(adapter, temporary, base))
            how = f"LoRA of a proxy LLM (stage 1 of DPA) for `{public(base)}`: `PeftModel.from_pretrained(llm, ...)`."
            bases = (hub_id(base),)
            write_card(temporary, title=target.name, how=how, origin=None, gates=gates, library="peft", base=bases)
            _move(temporary, target)
    except BaseException:
        llava.remove(temporary)
        raise
    return Export(checkpoint, "peft", target, gates, {"base": base})
