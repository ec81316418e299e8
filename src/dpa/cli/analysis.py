"""``dpa compare`` and ``dpa report``: look at finished runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dpa.cli.output import Json, emit


def compare_command(
    runs: Annotated[list[Path], typer.Argument(help="Run folders.", show_default=False)],
    as_json: Json = False,
) -> None:
    """Methods side by side, with intervals and paired differences."""
    from dpa.analyze.compare import compare_runs

    result = compare_runs(runs)
    emit(result.to_dict()) if as_json else typer.echo(result.text())


def report_command(run: Annotated[Path, typer.Argument(help="Run folder.", show_default=False)]) -> None:
    """Writes the run's report.html anew; prints its path."""
    from dpa.analyze.report import write_report

    typer.echo(str(write_report(run)))


def add_to(app: typer.Typer) -> None:
    """Registers the commands of this module."""
    app.command("compare", epilog="Example: dpa compare runs/quickstart runs/lab-cal")(compare_command)
    app.command("report", epilog="Example: dpa report runs/quickstart")(report_command)
