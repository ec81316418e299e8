"""``dpa explain``: what the image adds to each token, and what weight that gives it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dpa.cli.output import Json, check_output, emit
from dpa.errors import UserError
from dpa.log import quiet_libraries

if TYPE_CHECKING:
    from dpa.analyze.explain import Explanation


def explain_command(
    checkpoint: Annotated[
        str, typer.Argument(help="Checkpoint folder, hub id, run folder or RUN/METHOD.", show_default=False)
    ],
    image: Annotated[Path | None, typer.Argument(help="Image file.", show_default=False)] = None,
    text: Annotated[str | None, typer.Argument(help="Caption, or with --prompt an answer.", show_default=False)] = None,
    prompt: Annotated[str | None, typer.Option(help="What TEXT answers; without it TEXT is a caption.")] = None,
    other: Annotated[str | None, typer.Option(help="Another checkpoint (or run), side by side.")] = None,
    kind: Annotated[
        str | None, typer.Option(help="cmo, cal or prior; default: cmo, with --samples the stage's objective.")
    ] = None,
    proxy: Annotated[Path | None, typer.Option(help="Adapter to merge into CHECKPOINT's LLM.")] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="So many samples of a run's data instead.")] = None,
    stage: Annotated[
        str | None,
        typer.Option(help="Of a run: pretrain (its model and captions) or finetune; default with --samples: pretrain."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the draw of samples; default: the recipe's.")] = None,
    truth: Annotated[Path | None, typer.Option(help="Caption file with visual_spans that holds TEXT.")] = None,
    out: Annotated[Path | None, typer.Option(help="HTML file; default: explain.html.", show_default=False)] = None,
    png: Annotated[Path | None, typer.Option(help="Picture for a paper; of several samples one file each.")] = None,
    as_json: Json = False,
) -> None:
    """Colours each token by what the image adds to its probability. HTML by default."""
    sources = [checkpoint] if other is None else [checkpoint, other]
    if (samples is None) != (image is not None and text is not None):
        raise UserError("give IMAGE and TEXT, or --samples N with a run's folder")
    if samples is not None and (image, text, prompt, truth) != (None, None, None, None):
        raise UserError("--samples reads images and texts from the run's data: leave IMAGE, --prompt and --truth out")
    if png is not None and png.suffix.lower() != ".png":
        raise UserError(f"--png {png}: the figure is written as PNG; name it .png")
    if out is None and png is None and not as_json:
        out = Path("explain.html")
    check_output(out)
    check_output(png)
    from dpa.pipeline.explain import explain_samples, explain_text, headline
    from dpa.pipeline.models import stage_named

    quiet_libraries()
    named = None if stage is None else stage_named(stage)
    if samples is None:
        assert image is not None
        assert text is not None
        rows = [
            explain_text(
                sources,
                image,
                text,
                prompt=prompt,
                stage=named or "finetune",
                kind=kind or "cmo",
                proxy=proxy,
                truth=truth,
            )
        ]
    else:
        rows = explain_samples(sources, samples=samples, stage=named, kind=kind, proxy=proxy, seed=seed)
    written = _write(rows, out, png)
    if as_json:
        emit({"explanations": [item.to_dict() for row in rows for item in row], "written": list(map(str, written))})
        return
    for line in headline([item for row in rows for item in row]):
        typer.echo(line)
    for path in written:
        typer.echo(f"written: {path}")


def _write(rows: list[tuple[Explanation, ...]], out: Path | None, png: Path | None) -> list[Path]:
    from dpa.analyze.explain_page import write_page

    written = []
    if out is not None:
        write_page(out, rows)
        written.append(out)
    if png is not None:
        places = [png] if len(rows) == 1 else [png.with_stem(f"{png.stem}-{number + 1}") for number in range(len(rows))]
        for place, row in zip(places, rows, strict=True):
            row[0].png(place, *row[1:])
        written += places
    return written


def add_to(app: typer.Typer) -> None:
    """Registers the command."""
    app.command(
        "explain",
        epilog='Example: dpa explain runs/quickstart/checkpoint photo.jpg "A dog on a red sofa." --out dog.html   '
        "Example: dpa explain runs/quickstart --samples 8 --other runs/quickstart/vanilla",
    )(explain_command)
