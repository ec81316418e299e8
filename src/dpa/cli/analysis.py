"""``dpa compare`` and ``dpa report``: look at finished runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dpa.cli.output import Json, check_output


def compare_command(
    folders: Annotated[
        list[Path],
        typer.Argument(help="Run folders, checkpoints that dpa eval has seen, or its --out.", show_default=False),
    ],
    form: Annotated[str, typer.Option("--format", help="text, markdown, latex, csv or json.")] = "text",
    out: Annotated[Path | None, typer.Option(help="File to write instead of stdout.")] = None,
    baseline: Annotated[
        str | None, typer.Option(help="Column that the others are compared with; default: vanilla, else the first.")
    ] = None,
    paper: Annotated[str | None, typer.Option(help="The paper's rows below: qwen2.5-7b/sharegpt4v, ...")] = None,
    each_seed: Annotated[
        bool, typer.Option("--each-seed", help="Runs that differ in their seed alone stay columns of their own.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Methods side by side: numbers with intervals, average, wins, paired differences."""
    check_output(out)
    from dpa.analyze.compare import compare_runs, paper_rows, render, save

    rows = None if paper is None else paper_rows(paper)
    result = compare_runs(folders, paper=rows, combine=not each_seed, baseline=baseline)
    text = render(result, "json" if as_json else form)
    typer.echo(text) if out is None else save(text, out)


def report_command(run: Annotated[Path, typer.Argument(help="Run folder.", show_default=False)]) -> None:
    """Writes the run's report.html anew; prints its path."""
    from dpa.analyze.report import write_report

    typer.echo(str(write_report(run)))


def add_to(app: typer.Typer) -> None:
    """Registers the commands of this module."""
    app.command("compare", epilog="Example: dpa compare runs/quickstart runs/lab-cal --format latex --out table.tex")(
        compare_command
    )
    app.command("report", epilog="Example: dpa report runs/quickstart")(report_command)
