"""``dpa chat --web``: a gradio page with two conversations side by side, with the picture and without it.

The page's functions take and give plain values and need no gradio; :func:`serve` alone imports it (extra ``web``).
A conversation lies in the reader's page, not here, so several readers do not meet.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from PIL import Image

from dpa.data.images import load_image
from dpa.errors import DpaError, UserError
from dpa.evaluate.chat import MAX_NEW_TOKENS, Role, both_ways
from dpa.evaluate.generate import MAX_IMAGE_PIXELS
from dpa.models.vlm import Vlm

Messages = list[dict[str, Any]]
"""gradio's messages: role and content."""
REFUSED = "No answer"
"""Title of a message of ours in an answer's place."""


def check_gradio() -> None:
    """Raises UserError where the extra is not installed; before a model is loaded."""
    if find_spec("gradio") is None:
        raise UserError('dpa chat --web needs gradio, which is not installed: pip install "dpa[web]"')


class Page:
    """What the page does."""

    def __init__(self, vlm: Vlm, *, max_new_tokens: int = MAX_NEW_TOKENS) -> None:
        self._vlm = vlm
        self._max_new_tokens = max_new_tokens

    def respond(
        self, question: str, image: str | None, compare: bool, seeing: Messages, blind: Messages
    ) -> Iterator[tuple[Messages, Messages, str]]:
        """Answers a question in both conversations, word by word.

        Args:
            question: may be empty, then nothing happens.
            image: file of the picture; None: there is none.
            compare: ask without the picture, too.
            seeing, blind: the conversations so far.

        Yields:
            Both conversations so far, and what is left in the question's box.
        """
        if not question.strip():
            yield seeing, blind, question
            return
        seeing = [*seeing, {"role": "user", "content": question}]
        compare = compare and image is not None
        blind = [*blind, {"role": "user", "content": question}] if compare else []
        yield seeing, blind, ""
        with_answer, without_answer = seeing, blind
        try:
            picture: Image.Image | None = None
            if image is not None:
                picture = load_image(Path(image), max_pixels=MAX_IMAGE_PIXELS)
            answers = both_ways(
                self._vlm,
                turns_of(seeing),
                turns_of(blind) if compare else None,
                picture,
                max_new_tokens=self._max_new_tokens,
            )
            for seen, unseen in answers:
                with_answer = _answered(seeing, seen)
                without_answer = _answered(blind, unseen) if compare else blind
                yield with_answer, without_answer, ""
        except DpaError as error:  # as an answer that no later question carries along
            refusal = {"role": "assistant", "content": str(error), "metadata": {"title": REFUSED}}
            yield [*seeing, refusal], without_answer, question

    @staticmethod
    def start_anew() -> tuple[Messages, Messages]:
        """Another picture, or a wish: both conversations are empty."""
        return [], []


def turns_of(messages: Sequence[dict[str, Any]]) -> list[tuple[Role, str]]:
    """gradio's messages as turns; a question that got no answer, or a refusal in its place, is left out."""
    turns: list[tuple[Role, str]] = []
    for message in messages:
        text = text_of(message["content"])
        if message["role"] == "user":
            if turns and turns[-1][0] == "user":
                turns.pop()
            turns.append(("user", text))
        elif text and (message.get("metadata") or {}).get("title") != REFUSED and turns and turns[-1][0] == "user":
            turns.append(("assistant", text))
    return turns


def text_of(content: Any) -> str:
    """A message's text: gradio hands it back as it was given, or as a list of parts."""
    if isinstance(content, str):
        return content
    if isinstance(content, dict):
        return str(content.get("text", ""))
    return "".join(text_of(part) for part in content)


def _answered(messages: Messages, answer: str) -> Messages:
    return [*messages, {"role": "assistant", "content": answer}] if answer else messages


def build(page: Page, *, name: str, image: Path | None) -> Any:
    """The page as gradio's Blocks. Nothing is fetched from elsewhere, nothing is reported."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    import gradio

    with gradio.Blocks(title=f"{name} · dpa chat", analytics_enabled=False) as blocks:
        gradio.Markdown(f"### {_escaped(name)}")
        with gradio.Row():
            with gradio.Column(scale=1, min_width=260):
                picture = gradio.Image(
                    value=None if image is None else str(image), type="filepath", label="Picture", sources=["upload"]
                )
                compare = gradio.Checkbox(value=True, label="also without the picture")
                anew = gradio.Button("Start anew")
            with gradio.Column(scale=3):
                with gradio.Row():
                    kept = {
                        "render_markdown": False,
                        "allow_tags": False,
                        "feedback_options": None,
                        "buttons": ["copy"],
                    }
                    seeing = gradio.Chatbot(label="With the picture", **kept)
                    blind = gradio.Chatbot(label="Without it", **kept)
                question = gradio.Textbox(label="Question", placeholder="What is in the picture?", submit_btn=True)
        talk = [question, picture, compare, seeing, blind]
        # one at a time: there is one model
        question.submit(page.respond, talk, [seeing, blind, question], api_name="respond", concurrency_limit=1)
        anew.click(page.start_anew, None, [seeing, blind], api_name="start_anew")
        picture.change(page.start_anew, None, [seeing, blind], api_name=False)
    return blocks


def serve(page: Page, *, name: str, host: str, port: int, image: Path | None) -> None:
    """Until Ctrl-C.

    Raises:
        UserError: the port is taken.
    """
    blocks = build(page, name=name, image=image)
    import gradio

    fonts = ["system-ui", "sans-serif"]  # gradio's own come from Google
    theme = gradio.themes.Default(font=fonts, font_mono=["ui-monospace", "monospace"])
    try:
        allowed = None if image is None else [str(image.resolve())]
        blocks.launch(server_name=host, server_port=port, share=False, theme=theme, allowed_paths=allowed)
    except OSError as error:
        raise UserError(f"--port {port}: {error}; choose another") from None


def _escaped(text: str) -> str:
    """Markdown leaves it as it is."""
    return "".join(f"\\{character}" if character in "\\`*_{}[]<>()#+-.!|" else character for character in text)
