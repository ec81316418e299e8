"""A plan for people in a terminal."""

from __future__ import annotations

import io

from rich.console import Console
from rich.table import Table

from dpa.plan.plan import RESERVE, RunPlan, StagePlan

_SIDES = ("stage", "methods", "data")


def plan_text(plan: RunPlan) -> str:
    """Stages, memory, disk, problems."""
    machine, parts = plan.machine, plan.parts
    share = max(machine.mfu.values())
    speed = f"{share:.0%} of {machine.gpu.flops:.3g} FLOP/s (stated; --calibrate measures it)"
    if machine.measured:
        measured = ", ".join(f"{stage} {of * machine.gpu.flops:.2g}" for stage, of in machine.mfu.items())
        speed = f"FLOP/s measured on this machine: {measured}"
    lines = [
        f"{plan.recipe}: {machine.ranks} x {machine.gpu.title}, {plan.parallel}; {speed}",
        f"LLM {parts.llm_parameters / 1e9:.3f} B ({_source(parts.sources['llm'])}), vision tower "
        f"{parts.tower_parameters / 1e6:.0f} M ({_source(parts.sources['vision_tower'])}), connector "
        f"{parts.connector_parameters / 1e6:.1f} M, {parts.image_tokens} tokens an image",
    ]
    blocks = ["\n".join(lines), _stages(plan), _memory(plan)]
    if not all(stage.counted for stage in plan.stages):
        blocks.append("* not here: counted with the data set's published size and assumed lengths")
    disk = ", ".join(f"{name} {_size(size)}" for name, size in plan.disk.items())
    blocks.append(f"disk: {_size(sum(plan.disk.values()))} ({disk})\nloader processes per GPU: {plan.workers}")
    for level, title in (("error", "in the way"), ("advice", "worth knowing")):
        found = dict.fromkeys(str(problem) for problem in plan.problems if problem.level == level)
        if found:
            blocks.append("\n".join([f"{title}:", *(f"  {text}" for text in found)]))
    if plan.can_run:
        blocks.append(f"can run: about {_hours(plan.hours)} in all")
    return "\n\n".join(blocks)


def _stages(plan: RunPlan) -> str:
    names = ("stage", "methods", "data", "state", "samples", "steps", "tokens", "trained", "frozen", "expected")
    table = Table(box=None, pad_edge=False)
    for name in names:
        table.add_column(name, justify="left" if name in (*_SIDES, "state") else "right")
    for stage in plan.stages:
        table.add_row(
            stage.stage,
            " ".join(stage.methods) + f" ({stage.objective})",
            "counted" if stage.counted else "assumed*",
            stage.state,
            f"{stage.samples:,}",
            f"{stage.steps:,}",
            _short(stage.tokens),
            _short(stage.trained),
            _short(stage.frozen),
            _hours(stage.hours),
        )
    return _plain(table)


def _memory(plan: RunPlan) -> str:
    parts: dict[str, None] = {}
    for stage in plan.stages:
        parts |= dict.fromkeys(name for name in stage.memory if name not in ("total", "resident"))
    table = Table(box=None, pad_edge=False, title="memory per GPU, GB", title_justify="left")
    table.add_column("stage")
    for name in (*parts, "total", f"of {plan.machine.memory / 1e9:.0f}"):
        table.add_column(name, justify="right")
    for stage in plan.stages:
        shown = [f"{stage.memory.get(name, 0.0) / 1e9:.1f}" for name in parts]
        table.add_row(_named(plan, stage), *shown, f"{stage.memory['total'] / 1e9:.1f}", "fits" if stage.fits else "NO")
    return _plain(table) + f"\n({RESERVE:.0%} are kept free for the device's context and fragments)"


def _named(plan: RunPlan, stage: StagePlan) -> str:
    same = [other for other in plan.stages if other.stage == stage.stage]
    return stage.stage if len(same) == 1 else f"{stage.stage} ({' '.join(stage.methods)})"


def _source(name: str) -> str:
    return {"table": "known configuration", "hub": "downloaded configuration"}.get(name, name)


def _short(number: float) -> str:
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.3g} {unit}"
    return f"{number:.0f}"


def _size(size: float) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


def _hours(hours: float) -> str:
    if hours >= 1:
        return f"{hours:,.1f} h"
    return f"{hours * 60:.1f} min" if hours * 60 >= 1 else f"{hours * 3600:.0f} s"


def _plain(table: Table) -> str:
    console = Console(file=io.StringIO(), width=220, color_system=None)
    with console.capture() as captured:
        console.print(table)
    return "\n".join(line.rstrip() for line in captured.get().rstrip().split("\n"))
