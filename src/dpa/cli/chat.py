"""``dpa chat``: talk to a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dpa.log import quiet_libraries


def chat_command(
    checkpoint: Annotated[
        str, typer.Argument(help="Checkpoint folder, hub id, run folder or RUN/METHOD.", show_default=False)
    ],
    image: Annotated[Path | None, typer.Option(help="Picture to talk about.")] = None,
    proxy: Annotated[Path | None, typer.Option(help="Adapter to merge into the LLM.")] = None,
    stage: Annotated[str, typer.Option(help="Of a run: finetune, or pretrain (connector and proxy LLM).")] = "finetune",
    blind: Annotated[bool, typer.Option("--blind", help="Keep the picture back at first.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer at most.")] = 512,
    web: Annotated[bool, typer.Option("--web", help="A page in the browser (extra dpa[web]).")] = False,
    host: Annotated[str, typer.Option(help="--web: address to listen on; 0.0.0.0: everybody's.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="--web: port.")] = 7860,
) -> None:
    """Questions a line, answers as they come; /help inside. From a pipe: answers alone, then the end."""
    from dpa.data.images import load_image
    from dpa.evaluate.chat import Conversation
    from dpa.evaluate.chat_terminal import talk
    from dpa.evaluate.chat_web import Page, check_gradio, serve
    from dpa.evaluate.generate import MAX_IMAGE_PIXELS
    from dpa.pipeline.models import open_model, stage_named

    if web:
        check_gradio()
    quiet_libraries()
    picture = None if image is None else load_image(image, max_pixels=MAX_IMAGE_PIXELS)  # before the model is loaded
    vlm, name = open_model(checkpoint, stage=stage_named(stage), proxy=proxy)
    if web:
        serve(Page(vlm, max_new_tokens=max_new_tokens), name=name, host=host, port=port, image=image)
        return
    talk(Conversation(vlm, max_new_tokens=max_new_tokens, picture=picture, blind=blind), name=name)


def add_to(app: typer.Typer) -> None:
    """Registers the command."""
    app.command("chat", epilog="Example: dpa chat runs/quickstart --image data/lab/images/heldout-000007.png")(
        chat_command
    )
