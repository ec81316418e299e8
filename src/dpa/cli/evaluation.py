"""``dpa eval``: generate and score."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from dpa.cli.output import Json, emit
from dpa.errors import UserError
from dpa.log import quiet_libraries


def eval_command(
    checkpoint: Annotated[str, typer.Argument(help="Checkpoint folder or hub id.", show_default=False)],
    data: Annotated[Path | None, typer.Option(help="Folder of the benchmark's files.", show_default=False)] = None,
    benchmarks: Annotated[str, typer.Option(help="Comma-separated names.")] = "lab",
    out: Annotated[Path | None, typer.Option(help="Folder for predictions; default: beside the checkpoint.")] = None,
    limit: Annotated[int | None, typer.Option(help="First so many questions.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions per forward.")] = 64,
    harness: Annotated[
        Literal["dpa", "lmms-eval"],
        typer.Option(
            help="Who asks and scores; lmms-eval is an extra (docs/evaluation.md), without --data it downloads."
        ),
    ] = "dpa",
    as_json: Json = False,
) -> None:
    """Generates and scores. A killed evaluation continues from its predictions."""
    if harness == "lmms-eval":
        from dpa.evaluate.harness.run import evaluate_with_lmms_eval

        outside = evaluate_with_lmms_eval(
            checkpoint, benchmarks=benchmarks.split(","), data=data, out=out, limit=limit, batch_size=batch_size
        )
        emit(outside.to_dict()) if as_json else typer.echo(outside.text())
        return
    from dpa.evaluate.checkpoint import evaluate_checkpoint, settings_of

    if data is None:
        raise UserError("--data is missing: the folder of the benchmarks' files")
    quiet_libraries()
    settings = settings_of(benchmarks=tuple(benchmarks.split(",")), data=data, limit=limit, batch_size=batch_size)
    result = evaluate_checkpoint(checkpoint, settings=settings, out=out)
    emit(result.to_dict()) if as_json else typer.echo(result.text())


def add_to(app: typer.Typer) -> None:
    """Registers the commands of this module."""
    app.command("eval", epilog="Example: dpa eval runs/quickstart/checkpoint --benchmarks lab --data data/lab")(
        eval_command
    )
