"""``dpa eval score``: score answers that are there already; and the group that makes ``eval`` two commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand
from typer.main import get_command

from dpa.cli.output import Json, emit


def score_command(
    benchmark: Annotated[
        str,
        typer.Option(help="mmbench, ai2d, docvqa, ocrbench, cvbench, mmvp, naturalbench or lab.", show_default=False),
    ],
    predictions: Annotated[
        Path, typer.Option(help="JSONL: id, prediction, answer, ... (docs/evaluation.md).", show_default=False)
    ],
    profile: Annotated[
        str, typer.Option(help="paper: as the toolkits do it; strict: the whole answer must be the option.")
    ] = "paper",
    vlmevalkit: Annotated[
        str, typer.Option(help="VLMEvalKit's letter rules for mmbench, ai2d: 2025-05 or 2026-08.")
    ] = "2025-05",
    as_json: Json = False,
) -> None:
    """Scores a file of answers, whoever gave them. Needs no model, no images and no judge."""
    from dpa.evaluate.scoring import ScoringRules, read_records, score

    rules = ScoringRules(profile=profile, vlmevalkit=vlmevalkit)  # type: ignore[arg-type]  # it checks them
    result = score(benchmark, read_records(predictions), rules)
    emit(result.to_dict(per_sample=True)) if as_json else typer.echo(result.text())


def _score() -> Any:
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command("score", epilog="Example: dpa eval score --benchmark mmbench --predictions answers.jsonl --json")(
        score_command
    )
    return get_command(app)


class EvalGroup(TyperCommand):
    """``eval``: a command of its own, and ``score`` below it.

    A click group takes its first argument for a command's name; here that is a checkpoint unless it is ``score``
    (a folder of that name is ``./score``).
    """

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """The context of the command that the first argument names; groups run the command of the context."""
        if args[:1] == ["score"]:
            return _score().make_context(f"{info_name} score", args[1:], parent=parent, **extra)
        return super().make_context(info_name, args, parent=parent, **extra)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """The options, then the command below."""
        super().format_options(ctx, formatter)
        with formatter.section("Commands"):
            formatter.write_dl([("score", _score().get_short_help_str(80) + " See: dpa eval score --help")])
