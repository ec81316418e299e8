"""Conversations: answers as generate gives them, what is remembered, pipe, terminal and page."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from dpa.errors import DataError, DpaError, UserError
from dpa.evaluate import chat_terminal, chat_web
from dpa.evaluate.chat import Conversation, both_ways, stream_answer
from dpa.evaluate.generate import Question, generate_answers
from dpa.models.checkpoint_io import load_checkpoint
from dpa.models.vlm import Vlm
from tests.checkpoints import write_tiny_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("chat") / "run")


@pytest.fixture(scope="module")
def vlm(checkpoint: Path) -> Vlm:
    return load_checkpoint(checkpoint)


@pytest.fixture
def picture(checkpoint: Path) -> Image.Image:
    return Image.open(checkpoint.parent / "picture.png").convert("RGB")


def test_a_streamed_answer_is_the_evaluations(vlm: Vlm, checkpoint: Path, picture: Image.Image) -> None:
    question = Question(id="q", text="what is it?", images=(checkpoint.parent / "picture.png",))
    for shown in (True, False):
        (expected,) = generate_answers(
            vlm.model, vlm.processor, [question], batch_size=1, max_new_tokens=12, with_image=shown
        )
        pieces = list(stream_answer(vlm, [("user", "what is it?")], picture if shown else None, max_new_tokens=12))
        assert "".join(pieces).strip() == expected.prediction


def test_what_a_conversation_remembers(vlm: Vlm, picture: Image.Image, checkpoint: Path) -> None:
    talk = Conversation(vlm, max_new_tokens=8, picture=picture)
    first = "".join(talk.ask("one?"))
    assert talk.turns == [("user", "one?"), ("assistant", first.strip())]
    second = "".join(talk.ask("two?"))
    whole = [("user", "one?"), ("assistant", first.strip()), ("user", "two?")]
    assert second == "".join(stream_answer(vlm, whole, picture, max_new_tokens=8))  # type: ignore[arg-type]
    assert len(talk.turns) == 4
    talk.blind = True
    talk.reset()
    assert "".join(talk.ask("one?")) == "".join(stream_answer(vlm, [("user", "one?")], None, max_new_tokens=8))
    with pytest.raises(DataError, match="stands for an image"):
        list(talk.ask("<image> again"))
    assert len(talk.turns) == 2
    with pytest.raises(DataError, match="does not exist"):
        talk.look_at(Path("gone.png"))
    assert len(talk.turns) == 2
    talk.look_at(checkpoint.parent / "picture.png")
    assert talk.turns == []


def test_who_stops_listening_ends_the_generation(
    vlm: Vlm, picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vlm.model.generation_config, "eos_token_id", None)
    steps = 0

    def count(*_: Any) -> None:
        nonlocal steps
        steps += 1

    handle = vlm.model.model.language_model.register_forward_pre_hook(count)  # type: ignore[union-attr]
    talk = Conversation(vlm, max_new_tokens=400, picture=picture)
    with closing(talk.ask("go on")) as pieces:  # type: ignore[type-var]
        said = next(pieces)
    handle.remove()
    assert 0 < steps < 400
    assert talk.turns == [("user", "go on"), ("assistant", said.strip())] or not said.strip()


def test_failures_are_told(vlm: Vlm, picture: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"has \d+ tokens, the model takes 512"):
        list(stream_answer(vlm, [("user", "x " * 600)], picture))

    def fail(**_: Any) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(vlm.model, "generate", fail)
    with pytest.raises(DpaError, match="no room; shorten"):
        list(stream_answer(vlm, [("user", "x")], picture))


def test_from_a_pipe(checkpoint: Path) -> None:
    command = [sys.executable, "-m", "dpa", "chat", str(checkpoint), "--max-new-tokens", "6"]
    command += ["--image", str(checkpoint.parent / "picture.png")]
    done = subprocess.run(
        command, input="what is it?\n/blind\nwhat is it?\n/quit\nnever\n", capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    vlm = load_checkpoint(checkpoint)
    talk = Conversation(vlm, max_new_tokens=6, picture=Image.open(checkpoint.parent / "picture.png").convert("RGB"))
    expected = []
    for blind in (False, True):
        talk.blind = blind
        expected.append(chat_terminal.printable("".join(talk.ask("what is it?"))))
    assert done.stdout == "".join(f"{answer}\n" for answer in expected)
    assert "kept back" in done.stderr
    wrong = subprocess.run(command, input="/nonsense\n", capture_output=True, text=True, check=False)
    assert wrong.returncode == 2
    assert "no such command" in wrong.stderr


class Slow(Conversation):
    """Is interrupted in the middle."""

    def ask(self, question: str) -> Iterator[str]:
        yield "\x1b[31mhalf"
        raise KeyboardInterrupt


def test_ctrl_c_ends_the_answer_and_not_the_program(
    vlm: Vlm, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = iter(["first", "/gone/", "/nonsense", "second", "/quit", "never"])
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("rich.console.Console.input", lambda *_: next(lines))
    chat_terminal.talk(Slow(vlm), name="tiny")
    shown = capsys.readouterr().out
    assert shown.count("half") == 3
    assert shown.count("(stopped)") == 3  # /gone/ is a path, so a question
    assert "no such command" in shown
    assert "\x1b[31mhalf" not in shown
    assert next(lines) == "never"


def test_both_ways(vlm: Vlm, picture: Image.Image) -> None:
    turns = [("user", "what is it?")]
    *_, last = both_ways(vlm, turns, turns, picture, max_new_tokens=8)  # type: ignore[arg-type]
    seen, blind = ("".join(stream_answer(vlm, turns, p, max_new_tokens=8)) for p in (picture, None))  # type: ignore[arg-type]
    assert last == (seen, blind)


def test_the_pages_functions(vlm: Vlm, checkpoint: Path) -> None:
    page, image = chat_web.Page(vlm, max_new_tokens=6), str(checkpoint.parent / "picture.png")
    *_, (seeing, blind, left) = page.respond("what is it?", image, True, [], [])
    assert left == ""
    assert [message["role"] for message in seeing] == ["user", "assistant"]
    assert blind[0] == seeing[0]
    # gradio hands texts back as parts
    parts = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in seeing]
    assert chat_web.turns_of(parts) == chat_web.turns_of(seeing)
    *_, (refused, _, left) = page.respond("an <image>?", image, False, seeing, [])
    assert left == "an <image>?"
    assert "stands for an image" in refused[-1]["content"]
    assert chat_web.turns_of([*refused, {"role": "user", "content": "next"}])[-1] == ("user", "next")
    assert len(chat_web.turns_of([*refused, {"role": "user", "content": "next"}])) == 3
    *_, (_, none, _) = page.respond("x", None, True, [], [])  # nothing to compare
    assert none == []
    assert list(page.respond("  ", image, True, seeing, blind)) == [(seeing, blind, "  ")]
    *_, (broken, _, _) = page.respond("x", image + ".gone", True, [], [])
    assert "does not exist" in broken[-1]["content"]


def test_without_gradio_the_command_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_web, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'pip install "dpa\[web\]"'):
        chat_web.check_gradio()
