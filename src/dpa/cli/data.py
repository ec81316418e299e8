"""``dpa data``: check, convert, captions."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dpa.cli.output import Json, check_output, emit
from dpa.cli.progress import bar
from dpa.errors import UserError
from dpa.log import quiet_libraries

if TYPE_CHECKING:
    from dpa.data.settings import DataSource

Images = Annotated[
    list[str] | None,
    typer.Option(help="Image folder, or PREFIX=FOLDER (repeat it); default: the folder of the data file."),
]


def data_check(
    source: Annotated[
        str, typer.Argument(help="Data file, folder or pattern; or a recipe (.yaml).", show_default=False)
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="For a recipe: key=value, dotted keys.", show_default=False)
    ] = None,
    llm: Annotated[str, typer.Option("--llm", "--tokenizer", help="LLM whose tokens are counted.")] = "lab:llm",
    vision_tower: Annotated[str, typer.Option(help="Tower, for the tokens of an image.")] = "lab:tower",
    images: Images = None,
    data_format: Annotated[str, typer.Option("--format", help="auto, llava, messages or pixmo.")] = "auto",
    limit: Annotated[int | None, typer.Option(min=1, help="So many samples, drawn at random.")] = None,
    stage: Annotated[str, typer.Option(help="Check as data of this stage: auto, proxy, pretrain, finetune.")] = "auto",
    max_length: Annotated[int | None, typer.Option(min=8, help="Tokens; default: the stage's.")] = None,
    max_bad_share: Annotated[float, typer.Option(min=0, max=1, help="Unusable samples allowed.")] = 0.01,
    decode: Annotated[
        bool | None,
        typer.Option(
            "--decode/--no-decode", help="Decode images, or read headers; default: decode up to 20000 images."
        ),
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Also write a report with sample images to this file.")] = None,
    store: Annotated[
        Path | None, typer.Option(help="Where results are kept; default: DPA_STORE or runs/.store.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Counts samples, tokens and images, and lists what training would leave out. Interrupted, it continues.

    Exit code 2 if training would not start. For a recipe only --decode, --html and --json count; the rest is in it.
    """
    check_output(html)
    from dpa.analyze.data_report import write_data_report
    from dpa.analyze.data_text import check_text
    from dpa.pipeline.data_check import check_recipe, check_source
    from dpa.recipe import load_recipe

    quiet_libraries()
    is_recipe = source.endswith((".yaml", ".yml"))
    if overrides and not is_recipe:
        raise UserError(f"{' '.join(overrides)}: one source at a time; key=value is for recipes")
    with bar("checking", quiet=as_json) as progress:
        if is_recipe:
            found = check_recipe(load_recipe(source, overrides or ()), decode=decode, progress=progress)
        else:
            found = check_source(
                _source(source, images, data_format, limit),
                stage=stage,
                llm=llm,
                vision_tower=vision_tower,
                max_length=max_length,
                max_bad_share=max_bad_share,
                store=store,
                decode=decode,
                progress=progress,
            )
    if html is not None:
        write_data_report(html, found.stages, found.data, llm=found.llm, title=source)
    emit(found.to_dict()) if as_json else typer.echo(check_text(found.stages, found.llm))
    if html is not None and not as_json:
        typer.echo(f"report: {html}")
    if not found.can_train:
        raise typer.Exit(2)


def data_convert(
    source: Annotated[str, typer.Argument(help="Data file, folder or pattern.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="Folder to write.", show_default=False)],
    images: Images = None,
    data_format: Annotated[str, typer.Option("--format", help="auto, llava, messages or pixmo.")] = "auto",
    copy: Annotated[bool, typer.Option("--copy", help="Also copy images that are files.")] = False,
    as_json: Json = False,
) -> None:
    """Writes OUT/data.jsonl (LLaVA's format), and as files the images that lie inside tables."""
    from dpa.data.convert import convert

    with bar("converting", quiet=as_json) as progress:
        found = convert(
            _source(source, images, data_format, None), out, copy=copy, progress=lambda done: progress(done, 0)
        )
    emit(found.to_dict()) if as_json else typer.echo(found.text())


def data_captions(
    source: Annotated[str, typer.Argument(help="Captions: file, folder or pattern.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="File to write, *_text_only.json.", show_default=False)],
    data_format: Annotated[str, typer.Option("--format", help="auto, llava, messages or pixmo.")] = "auto",
    as_json: Json = False,
) -> None:
    """Writes the captions without their images, as the reference's stage 1 reads them."""
    check_output(out)
    from dpa.data.convert import write_captions

    with bar("writing", quiet=as_json) as progress:
        found = write_captions(_source(source, None, data_format, None), out, progress=lambda done: progress(done, 0))
    emit(found.to_dict()) if as_json else typer.echo(found.text())


def _source(path: str, images: list[str] | None, data_format: str, limit: int | None) -> DataSource:
    from pydantic import ValidationError

    from dpa.data.settings import DataSource

    folders = dict(_prefix(item) for item in images or [])
    if len(folders) != len(images or []):
        raise UserError("--images names one prefix twice: give one folder, or several as PREFIX=FOLDER")
    value = None if not folders else folders[""] if list(folders) == [""] else folders
    try:
        return DataSource.model_validate({"path": path, "images": value, "format": data_format, "limit": limit})
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{'.'.join(map(str, first['loc']))}: {first['msg']} (got {first['input']!r})") from None


def _prefix(item: str) -> tuple[str, str]:
    prefix, equals, folder = item.partition("=")
    # a folder may have "=" in its name
    return (prefix, folder) if equals and not Path(item).is_dir() else ("", item)


def add_to(app: typer.Typer) -> None:
    """Registers the commands of this module."""
    data = typer.Typer(help="Check, convert and reduce training data.", no_args_is_help=True)
    data.command(
        "check", epilog="Example: dpa data check captions.json --images images --llm Qwen/Qwen2.5-7B-Instruct"
    )(data_check)
    data.command("convert", epilog="Example: dpa data convert 'shards/*.parquet' data/mine")(data_convert)
    data.command("captions", epilog="Example: dpa data captions blip_558k.json blip_558k_text_only.json")(data_captions)
    app.add_typer(data, name="data")
