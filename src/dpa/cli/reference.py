"""``dpa reference``: a run's results under the reference's names."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dpa.cli.output import Json, emit


def reference_command(
    run: Annotated[Path, typer.Argument(help="Run folder.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder of the reference's results.")] = Path("checkpoints"),
    as_json: Json = False,
) -> None:
    """Links what a run has finished to the names that the reference's scripts give it; overwrites nothing."""
    from dpa.results import describe, link_results

    linked = link_results(run, out)
    if as_json:
        emit({"links": describe(linked)})
        return
    for item in linked:
        typer.echo(f"{item.place} -> {item.place.readlink()}")


def add_to(app: typer.Typer) -> None:
    """Registers the commands of this module."""
    app.command("reference", epilog="Example: dpa reference runs/llama3.1-8b-blip558k-dpa --out checkpoints")(
        reference_command
    )
