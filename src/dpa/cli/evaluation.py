"""``dpa eval``: generate and score. ``dpa eval score`` is in ``scoring.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dpa.cli.output import Json, emit
from dpa.cli.scoring import EvalGroup
from dpa.log import quiet_libraries


def eval_command(
    checkpoint: Annotated[str, typer.Argument(help="Checkpoint folder or hub id.", show_default=False)],
    data: Annotated[Path, typer.Option(help="Folder of the benchmark's files.", show_default=False)],
    benchmarks: Annotated[str, typer.Option(help="Comma-separated names.")] = "lab",
    out: Annotated[Path | None, typer.Option(help="Folder for predictions; default: beside the checkpoint.")] = None,
    limit: Annotated[int | None, typer.Option(help="First so many questions.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions per forward.")] = 64,
    as_json: Json = False,
) -> None:
    """Generates and scores. A killed evaluation continues from its predictions."""
    from dpa.evaluate.checkpoint import evaluate_checkpoint, settings_of

    quiet_libraries()
    settings = settings_of(benchmarks=tuple(benchmarks.split(",")), data=data, limit=limit, batch_size=batch_size)
    result = evaluate_checkpoint(checkpoint, settings=settings, out=out)
    emit(result.to_dict()) if as_json else typer.echo(result.text())


def add_to(app: typer.Typer) -> None:
    """Registers the commands of this module."""
    example = "Example: dpa eval runs/quickstart/checkpoint --benchmarks lab --data data/lab"
    app.command("eval", cls=EvalGroup, epilog=example)(eval_command)
