"""``dpa lab``: the miniature world."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dpa.cli.output import Json, emit


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
    emit(manifest.to_dict()) if as_json else typer.echo(manifest.text())


def add_to(app: typer.Typer) -> None:
    """Registers the commands of this module."""
    lab = typer.Typer(help="The miniature world: data for a first run without any download.", no_args_is_help=True)
    lab.command("make", epilog="Example: dpa lab make data/lab --seed 1")(lab_make)
    app.add_typer(lab, name="lab")
