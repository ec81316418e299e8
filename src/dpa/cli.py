"""Commands: parse, call, print. Everything heavy is imported inside the commands, so that ``--help`` is instant."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from dpa.errors import DpaError, UserError
from dpa.log import quiet_libraries, setup_logging

app = typer.Typer(
    name="dpa",
    help="Decoupled Proxy Alignment: train multimodal LLMs whose connector learns to see.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
lab = typer.Typer(help="The miniature world: data for a first run without any download.", no_args_is_help=True)
app.add_typer(lab, name="lab")

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout, and nothing else there.")]


def _emit(value: dict[str, Any]) -> None:
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        from importlib.metadata import version as version_of

        typer.echo(f"dpa {version_of('dpa')}")
        raise typer.Exit


@app.command("run", epilog="Example: dpa run recipes/quickstart.yaml seed=1 stages.pretrain.learning_rate=1e-3")
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
        _emit(plan.to_dict()) if as_json else typer.echo(plan.text())
        return
    result = run(loaded, until=until)
    _emit(result.summary) if as_json else typer.echo(result.text())


@app.command("eval", epilog="Example: dpa eval runs/quickstart/checkpoint --benchmarks lab --data data/lab")
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
    _emit(result.to_dict()) if as_json else typer.echo(result.text())


@app.command("compare", epilog="Example: dpa compare runs/quickstart runs/lab-cal")
def compare_command(
    runs: Annotated[list[Path], typer.Argument(help="Run folders.", show_default=False)],
    as_json: Json = False,
) -> None:
    """Methods side by side, with intervals and paired differences."""
    from dpa.analyze.compare import compare_runs

    result = compare_runs(runs)
    _emit(result.to_dict()) if as_json else typer.echo(result.text())


@app.command("report", epilog="Example: dpa report runs/quickstart")
def report_command(run: Annotated[Path, typer.Argument(help="Run folder.", show_default=False)]) -> None:
    """Writes the run's report.html anew; prints its path."""
    from dpa.analyze.report import write_report

    typer.echo(str(write_report(run)))


@lab.command("make", epilog="Example: dpa lab make data/lab --seed 1")
def lab_make(
    out: Annotated[Path, typer.Argument(help="Folder to write.", show_default=False)],
    seed: Annotated[int, typer.Option(help="World; the same seed gives the same bytes.")] = 0,
    caption_scenes: Annotated[int, typer.Option(min=1, help="Scenes with captions.")] = 4000,
    instruction_scenes: Annotated[int, typer.Option(min=1, help="Scenes with questions.")] = 3000,
    heldout_scenes: Annotated[int, typer.Option(min=1, help="Scenes kept for evaluation.")] = 400,
    as_json: Json = False,
) -> None:
    """Writes images, captions in two languages, instructions and held-out questions."""
    from dpa.lab.make import make_lab

    manifest = make_lab(
        out,
        seed=seed,
        caption_scenes=caption_scenes,
        instruction_scenes=instruction_scenes,
        heldout_scenes=heldout_scenes,
    )
    _emit(manifest.to_dict()) if as_json else typer.echo(manifest.text())


def main(arguments: list[str] | None = None) -> None:
    """Entry point: exit code 0, 1 (the run failed), 2 (the user's input is wrong), 130 (interrupted)."""
    setup_logging(quiet="--json" in (sys.argv[1:] if arguments is None else arguments))
    try:
        app(args=arguments)
    except UserError as error:
        _fail(f"dpa: {error}", error.exit_code)
    except DpaError as error:
        _fail(f"dpa: {error}", error.exit_code)
    except KeyboardInterrupt:
        _fail("dpa: interrupted; the same command continues from the last saved state", 130)


def _fail(message: str, code: int) -> None:
    typer.echo(message, err=True)
    raise SystemExit(code)
