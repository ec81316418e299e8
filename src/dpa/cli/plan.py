"""``dpa plan``: what a run will need."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dpa.cli.output import Json, emit
from dpa.log import quiet_libraries


def plan_command(
    recipe: Annotated[Path, typer.Argument(help="Recipe (YAML).", show_default=False)],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, dotted keys.", show_default=False)] = None,
    gpu: Annotated[str, typer.Option(help="Kind of GPU: h100, h200, a100, a100-40, l40s, ...")] = "h100",
    gpu_memory: Annotated[float | None, typer.Option(min=0.1, help="GB per GPU; default: the kind's.")] = None,
    mfu: Annotated[float | None, typer.Option(min=0.01, max=1, help="Share of the GPU's FLOP/s; default: 0.4.")] = None,
    calibrate: Annotated[bool, typer.Option("--calibrate", help="Measure the speed here, with a few steps.")] = False,
    as_json: Json = False,
) -> None:
    """Memory, steps, hours and disk of a run, and what is missing. Trains nothing; exit code 2 if it cannot run."""
    from dpa.plan.calibrate import calibrate as measure
    from dpa.plan.machine import machine_of
    from dpa.plan.plan import make_plan
    from dpa.plan.text import plan_text
    from dpa.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    quiet_libraries()
    machine = machine_of(loaded, gpu, gpu_memory, mfu)
    plan = make_plan(loaded, machine)
    if calibrate and all(stage.counted for stage in plan.stages):
        stages = tuple(dict.fromkeys(stage.stage for stage in plan.stages))
        plan = make_plan(loaded, measure(loaded, machine, stages))
    emit(plan.to_dict()) if as_json else typer.echo(plan_text(plan))
    if not plan.can_run:
        raise typer.Exit(2)


def add_to(app: typer.Typer) -> None:
    """Registers the commands of this module."""
    example = "Example: dpa plan recipes/paper/qwen2.5-7b/blip558k.yaml parallel=fsdp gpus=8 --gpu a100"
    app.command("plan", epilog=example)(plan_command)
