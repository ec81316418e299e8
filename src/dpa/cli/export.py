"""``dpa export``: a checkpoint in the layouts of others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dpa.cli.output import Json, emit
from dpa.log import quiet_libraries


def export_command(
    checkpoint: Annotated[
        str,
        typer.Argument(help="Run folder, checkpoint folder or hub id (peft: run or proxy folder).", show_default=False),
    ],
    to: Annotated[str, typer.Option(help="Layout: hf, llava or peft.", show_default=False)],
    out: Annotated[Path | None, typer.Option(help="Folder to write; default: CHECKPOINT.LAYOUT beside it.")] = None,
    dtype: Annotated[str | None, typer.Option(help="bf16, fp16 or fp32; default: as stored.")] = None,
    shard_size: Annotated[str, typer.Option(help="Largest weight file.")] = "5GB",
    tower: Annotated[
        str | None, typer.Option(help="llava: hub id of the vision tower; default: the folder written beside.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Writes, reads back, compares logits and token ids, and publishes only what is equal."""
    from dpa.export.command import export_checkpoint

    quiet_libraries()
    result = export_checkpoint(checkpoint, to=to, out=out, dtype=dtype, shard_size=shard_size, tower=tower)
    emit(result.to_dict()) if as_json else typer.echo(result.text())


def add_to(app: typer.Typer) -> None:
    """Registers the commands of this module."""
    app.command("export", epilog="Example: dpa export runs/quickstart --to hf --dtype bf16 --out my-llava")(
        export_command
    )
