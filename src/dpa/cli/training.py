"""``dpa run``: train."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dpa.cli.output import Json, emit
from dpa.launch import launched
from dpa.log import quiet_libraries


def run_command(
    recipe: Annotated[Path, typer.Argument(help="Recipe (YAML).", show_default=False)],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, dotted keys.", show_default=False)] = None,
    until: Annotated[
        str | None, typer.Option(help="Stop after this stage: proxy, pretrain, finetune (or 1, 2, 3).")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and show the plan; train nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Trains: proxy LLM, connector, multimodal LLM. Started again, it continues where it stopped."""
    from dpa.pipeline import dry_run as plan_only
    from dpa.pipeline import run
    from dpa.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    quiet_libraries()
    if dry_run:
        plan = plan_only(loaded, until=until)
        if launched().speaks:
            emit(plan.to_dict()) if as_json else typer.echo(plan.text())
        return
    result = run(loaded, until=until)
    if not launched().speaks:
        return
    emit(result.summary) if as_json else typer.echo(result.text())


def add_to(app: typer.Typer) -> None:
    """Registers the commands of this module."""
    app.command("run", epilog="Example: dpa run recipes/quickstart.yaml seed=1 stages.pretrain.learning_rate=1e-3")(
        run_command
    )
