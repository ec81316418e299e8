"""What commands print, and how."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from dpa.errors import UserError

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout, and nothing else there.")]


def check_output(path: Path | None) -> None:
    """Whether a file could be written, asked before the work whose result it is to hold. None: no file is asked for.

    Raises:
        UserError: it could not.
    """
    if path is None:
        return
    try:
        place = path.resolve()
        if place.is_dir():
            raise UserError(f"{path} cannot be written: it is a folder; name a file")
        if path.exists() and not path.is_file():
            return  # /dev/stdout, a pipe
        folder = next(folder for folder in place.parents if folder.exists())
    except (OSError, RuntimeError) as error:  # a name that is too long, a link to itself
        raise UserError(f"{path} cannot be written: {error}; choose another place") from None
    if not folder.is_dir():
        raise UserError(f"{path} cannot be written: {folder} is a file, not a folder; choose another place")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(
            f"{path} cannot be written: no permission to write in {folder}; mend permissions or choose another place"
        )


def emit(value: dict[str, Any]) -> None:
    """Prints a result as JSON."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))
