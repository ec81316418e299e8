"""``dpa chat`` in a terminal, or in a pipe: a question a line, the answers as they come."""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path

from rich.console import Console

from dpa.errors import DpaError, UserError
from dpa.evaluate.chat import Conversation

HELP = """/image FILE   look at a picture; starts a new conversation
/blind        keep the picture back, or show it again
/reset        start anew with the same picture
/quit         leave (as does Ctrl-D); Ctrl-C ends an answer"""


def talk(conversation: Conversation, *, name: str) -> None:
    """Until /quit or the end of the input. Piped input gives bare answers on stdout, one after another.

    Args:
        conversation: with its picture, if there is one.
        name: of the model, for the first line.

    Raises:
        DpaError: in a pipe, where a question failed; in a terminal the message is shown and the talk goes on.
    """
    if not sys.stdin.isatty():
        for line in sys.stdin:
            if not _turn(conversation, line.strip(), _plain, _aside):
                return
        return
    console = Console(highlight=False, markup=False)
    console.print(f"{name}. {_state(conversation)} /help lists the commands.", style="dim")
    for line in _lines(console):
        try:
            if not _turn(conversation, line.strip(), _plain, lambda text: console.print(text, style="dim")):
                return
        except DpaError as error:
            console.print(str(error), style="red")


def _lines(console: Console) -> Iterator[str]:
    """Lines with history and editing where the platform has them."""
    with suppress(ImportError):  # Windows
        import readline  # noqa: F401 (its import gives input() a history)
    while True:
        try:
            yield console.input("› ")
        except KeyboardInterrupt:
            console.print("\n(Ctrl-C ends an answer; /quit leaves)", style="dim")
        except EOFError:
            console.print()
            return


def _turn(conversation: Conversation, line: str, say: Callable[[str], None], aside: Callable[[str], None]) -> bool:
    """One line of input; False: it was the last.

    Args:
        say: takes pieces of answers.
        aside: takes whole lines that are no answer.
    """
    command, _, argument = line.partition(" ")
    if command == "/quit":
        return False
    if command in ("/reset", "/blind", "/image", "/help"):
        if command == "/reset":
            conversation.reset()
        elif command == "/blind":
            conversation.blind = not conversation.blind
        elif command == "/image":
            if not argument.strip():
                raise UserError("/image needs a file: /image photo.jpg")
            conversation.look_at(Path(argument.strip().strip("\"'")).expanduser())
        aside(HELP if command == "/help" else _state(conversation))
    elif line.startswith("/") and "/" not in command[1:]:
        raise UserError(f"{command}: no such command\n{HELP}")
    elif line:
        _answer(conversation, line, say, aside)
    return True


def _answer(
    conversation: Conversation, question: str, say: Callable[[str], None], aside: Callable[[str], None]
) -> None:
    try:
        with closing(conversation.ask(question)) as pieces:  # type: ignore[type-var]
            for piece in pieces:
                say(printable(piece))
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
        say("\n")
        aside("(stopped)")
        return
    say("\n")


def _state(conversation: Conversation) -> str:
    if conversation.picture is None:
        return "No picture: /image FILE."
    width, height = conversation.picture.size
    return f"Picture of {width} x {height}" + (", kept back (blind)." if conversation.blind else ".")


def printable(text: str) -> str:
    """Without control characters: a model must not steer the terminal."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs"))


def _plain(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _aside(text: str) -> None:
    sys.stderr.write(text + "\n")
