"""``dpa ablate``: methods x seeds x a grid of settings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dpa.cli.output import Json, emit
from dpa.log import quiet_libraries


def ablate_command(
    recipe: Annotated[Path, typer.Argument(help="Ablation file, or a recipe (YAML).", show_default=False)],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, dotted keys.", show_default=False)] = None,
    seeds: Annotated[str | None, typer.Option(help="Comma-separated, in place of the file's.")] = None,
    shard: Annotated[str | None, typer.Option(help="i/n: the i-th of n parts, for several machines.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check every run and count the work; train nothing.")
    ] = False,
    report_only: Annotated[bool, typer.Option("--report-only", help="Collect what is there; train nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Trains and compares; stages that are equal are shared. Started again, it continues."""
    from dpa.ablation.collect import collect, write_results
    from dpa.ablation.figures import pictures_of, write_pictures
    from dpa.ablation.grid import cells_of, load_ablation, shard_of
    from dpa.ablation.report import write_report
    from dpa.ablation.run import look_ahead, run_cells
    from dpa.errors import RecipeError

    try:
        chosen = None if seeds is None else [int(seed) for seed in seeds.split(",")]
    except ValueError:
        raise RecipeError(f"--seeds {seeds}: expected whole numbers, e.g. 0,1,2") from None
    ablation = load_ablation(recipe, overrides or (), seeds=chosen)
    cells = cells_of(ablation)
    mine = shard_of(cells, shard)
    quiet_libraries()
    failures = []
    if not report_only:
        work = look_ahead(mine)
        typer.echo(work.text(), err=True)
        if dry_run:
            if as_json:
                emit({"cells": [cell.title for cell in mine], "to_train": work.to_train, "steps": work.steps})
            else:
                typer.echo("\n".join(cell.title for cell in mine))
            return
        failures = run_cells(mine, tell=lambda line: typer.echo(line, err=True))
    results = collect(ablation, cells)
    written = [*write_results(results)]
    pictures = pictures_of(results)
    written += write_pictures(pictures, ablation.folder / "figures")
    written.append(write_report(results, pictures))
    emit(results.to_dict()) if as_json else typer.echo(f"{results.text()}\n\nreport: {written[-1]}")
    for failure in failures:
        typer.echo(f"dpa: {failure.title} failed: {failure.message}", err=True)
    if failures:
        raise typer.Exit(1)


def add_to(app: typer.Typer) -> None:
    """Registers the commands of this module."""
    app.command("ablate", epilog="Example: dpa ablate recipes/lab/study.yaml --shard 1/2")(ablate_command)
