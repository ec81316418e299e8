"""What commands print, and how."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout, and nothing else there.")]


def emit(value: dict[str, Any]) -> None:
    """Prints a result as JSON."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))
