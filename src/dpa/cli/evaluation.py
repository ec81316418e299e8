"""``dpa eval``: generate and score. ``dpa eval score`` is in ``scoring.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from dpa.cli.output import Json, emit
from dpa.cli.scoring import EvalGroup
from dpa.errors import UserError
from dpa.log import quiet_libraries


def eval_command(
    checkpoint: Annotated[str, typer.Argument(help="Checkpoint folder or hub id.", show_default=False)],
    data: Annotated[Path | None, typer.Option(help="Folder of the benchmarks' files.", show_default=False)] = None,
    benchmarks: Annotated[str, typer.Option(help="Comma-separated names; paper: its seven; all: and the lab.")] = "lab",
    out: Annotated[Path | None, typer.Option(help="Folder for predictions; default: beside the checkpoint.")] = None,
    limit: Annotated[int | None, typer.Option(help="At most so many questions each; a partial result.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions per forward.")] = 64,
    profile: Annotated[str, typer.Option(help="Rules of scoring: paper or strict.")] = "paper",
    vlmevalkit: Annotated[
        str, typer.Option(help="Letter rules of the paper's profile: 2025-05 or 2026-08.")
    ] = "2025-05",
    blind: Annotated[bool | None, typer.Option(help="Also ask without the image; default: the lab only.")] = None,
    paper: Annotated[str | None, typer.Option(help="The paper's row beside ours: qwen2.5-7b/sharegpt4v, ...")] = None,
    devices: Annotated[
        str, typer.Option(help="Accelerators that share the questions, a copy of the model on each: a number or auto.")
    ] = "1",
    rank_options: Annotated[
        bool, typer.Option("--rank-options", help="Multiple choice also by each option's log-probability, separately.")
    ] = False,
    harness: Annotated[
        Literal["dpa", "lmms-eval"],
        typer.Option(
            help="Who asks and scores; lmms-eval is an extra (docs/evaluation.md), without --data it downloads."
        ),
    ] = "dpa",
    as_json: Json = False,
) -> None:
    """Generates and scores. A killed evaluation continues from its predictions."""
    from dpa.evaluate.progress import EvaluationProgress

    if harness == "lmms-eval":
        from dpa.evaluate.harness.run import evaluate_with_lmms_eval

        with EvaluationProgress() as progress:
            outside = evaluate_with_lmms_eval(
                checkpoint,
                benchmarks=benchmarks.split(","),
                data=data,
                out=out,
                limit=limit,
                batch_size=batch_size,
                progress=progress.of,
            )
        emit(outside.to_dict()) if as_json else typer.echo(outside.text())
        return
    from dpa.evaluate.checkpoint import evaluate_checkpoint, settings_of
    from dpa.evaluate.paper import paper_row

    if data is None:
        raise UserError("--data is missing: the folder of the benchmarks' files")
    quiet_libraries()
    settings = settings_of(
        benchmarks=tuple(benchmarks.split(",")),
        data=data,
        limit=limit,
        batch_size=batch_size,
        profile=profile,
        vlmevalkit=vlmevalkit,
        blind=blind,
        devices=devices,
        rank_options=rank_options,
    )
    row = None if paper is None else paper_row(paper)
    with EvaluationProgress() as progress:
        result = evaluate_checkpoint(checkpoint, settings=settings, out=out, progress=progress.of, paper=row)
    emit(result.to_dict()) if as_json else typer.echo(result.text())


def add_to(app: typer.Typer) -> None:
    """Registers the commands of this module."""
    example = "Example: dpa eval runs/quickstart/checkpoint --benchmarks lab --data data/lab"
    app.command("eval", cls=EvalGroup, epilog=example)(eval_command)
