"""``dpa conflict``: how far captions are from an LLM's own language, before any training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from dpa.cli.output import Json, check_output, emit
from dpa.cli.progress import bar
from dpa.errors import UserError
from dpa.log import quiet_libraries


def conflict_command(
    data: Annotated[str, typer.Argument(help="Captions: file, folder or pattern.", show_default=False)],
    llm: Annotated[str, typer.Option(help="LLM: lab:llm, a folder or a hub id.")] = "lab:llm",
    data_format: Annotated[str, typer.Option("--format", help="auto, llava, messages or pixmo.")] = "auto",
    sample: Annotated[int, typer.Option(min=1, help="Captions, drawn at random; half adapts the proxy.")] = 2000,
    adapt_steps: Annotated[
        int | None, typer.Option(min=1, help="Steps of 16 captions; default: 64, fewer for small samples.")
    ] = None,
    rank: Annotated[int, typer.Option(min=1, help="Of the proxy's LoRA.")] = 32,
    learning_rate: Annotated[float | None, typer.Option(help="Of the proxy; default: by the LLM's width.")] = None,
    proxy: Annotated[
        Path | None, typer.Option(help="An adapter that exists (a run's proxy/), in place of a brief one.")
    ] = None,
    max_length: Annotated[int, typer.Option(min=8, help="Tokens of a caption that are read.")] = 2048,
    batch_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens per forward; default: the device's.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    seed: Annotated[int, typer.Option(min=0, help="The same seed, the same numbers.")] = 0,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run the LLM's own code.")] = False,
    out: Annotated[Path | None, typer.Option(help="Also write a report (HTML) to this file.")] = None,
    as_json: Json = False,
) -> None:
    """How surprising captions are to an LLM, how much of it a brief text-only adaptation explains, and in which words.

    Reads no images and trains nothing that is kept. docs/conflict.md says how to read the result.
    """
    check_output(out)
    from dpa.analyze.conflict import measure_conflict, read_captions
    from dpa.analyze.conflict.report import write_conflict_report
    from dpa.analyze.conflict.text import conflict_text
    from dpa.models.settings import ModelSettings

    quiet_libraries()
    source, settings = _settings(
        {"path": data, "format": data_format},
        {
            "seed": seed,
            "rank": rank,
            "adapt_steps": adapt_steps,
            "learning_rate": learning_rate,
            "proxy": proxy,
            "max_length": max_length,
            "tokens_per_batch": batch_tokens,
        },
    )
    with bar("reading", quiet=as_json) as show:

        def progress(title: str, done: int, total: int) -> None:
            show(done, total, title)

        captions = read_captions(source, count=sample, seed=seed, progress=progress)
        model = ModelSettings(llm=llm, trust_remote_code=trust_remote_code)
        found = measure_conflict(captions, model, settings, device=device, progress=progress)
    if out is not None:
        write_conflict_report(found, out)
    emit(found.to_dict()) if as_json else typer.echo(conflict_text(found))
    if out is not None and not as_json:
        typer.echo(f"\nreport: {out}")


def _settings(source: dict[str, Any], settings: dict[str, Any]) -> tuple[Any, Any]:
    """The strict models, with a message in the words of the command line."""
    from pydantic import ValidationError

    from dpa.analyze.conflict.settings import ConflictSettings
    from dpa.data.settings import DataSource

    try:
        return DataSource.model_validate(source), ConflictSettings.model_validate(settings)
    except ValidationError as error:
        first = error.errors()[0]
        where = "--" + str(first["loc"][0]).replace("_", "-") if first["loc"] else "options"
        raise UserError(f"{where}: {first['msg']} (got {first['input']!r})") from None


def add_to(app: typer.Typer) -> None:
    """Registers the command of this module."""
    app.command(
        "conflict", epilog="Example: dpa conflict captions.json --llm Qwen/Qwen2.5-7B-Instruct --out conflict.html"
    )(conflict_command)
