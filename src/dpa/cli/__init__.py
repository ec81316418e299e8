"""Commands: parse, call, print. Everything heavy is imported inside the commands, so that ``--help`` is instant.

A module per group of commands; each has ``add_to(app)``.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from dpa.cli import (
    ablate,
    analysis,
    chat,
    conflict,
    data,
    evaluation,
    explain,
    export,
    lab,
    models,
    plan,
    reference,
    training,
)
from dpa.errors import DpaError, UserError
from dpa.launch import launched
from dpa.log import setup_logging

app = typer.Typer(
    name="dpa",
    help="Decoupled Proxy Alignment: train multimodal LLMs whose connector learns to see.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


_INTERRUPTED = "dpa: interrupted; the same command continues from the last saved state"


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        from importlib.metadata import version as version_of

        typer.echo(f"dpa {version_of('dpa')}")
        raise typer.Exit
    if context.invoked_subcommand != "run" and launched().world > 1:
        several = " and say --devices N" if context.invoked_subcommand == "eval" else ""
        raise UserError(f"dpa {context.invoked_subcommand} works in one process: start it without a launcher{several}")


GROUPS = (
    training,
    ablate,
    plan,
    data,
    evaluation,
    analysis,
    explain,
    chat,
    conflict,
    export,
    models,
    reference,
    lab,
)
for group in GROUPS:
    group.add_to(app)


def main(arguments: list[str] | None = None) -> None:
    """Entry point: exit code 0, 1 (the run failed), 2 (the user's input is wrong), 130 (interrupted)."""
    setup_logging(quiet="--json" in (sys.argv[1:] if arguments is None else arguments))
    try:
        if not launched().speaks:
            setup_logging(silent=True)
        app(args=arguments)
    except UserError as error:
        _fail(f"dpa: {error}", error.exit_code)
    except DpaError as error:
        _fail(f"dpa: {error}", error.exit_code)
    except KeyboardInterrupt:
        _fail(_INTERRUPTED, 130)
    except SystemExit as done:  # typer has caught the interrupt and says nothing
        if done.code == 130:
            _fail(_INTERRUPTED, 130)
        raise


def _fail(message: str, code: int) -> None:
    if os.environ.get("RANK", "0") == "0":  # one rank speaks
        typer.echo(message, err=True)
    raise SystemExit(code)
