"""One chat text for training and serving: a prelude before the family's own Jinja template.

Most LLMs' templates take plain strings only, and llava's processors hand over typed parts. The prelude turns every
content into the string that the family's template expects, then that template runs, unchanged. Training renders the
same template (``TextRules.chat_template``), so there is nothing that could drift apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jinja2.exceptions import TemplateError

from dpa.errors import ModelError

MARK = "{#- typed parts and plain strings, one text (dpa) -#}"
"""First thing in a serving template; tells it from an original."""

_PRELUDE = (
    MARK + "{%- set dpa = namespace(messages=[], text='', after_image=false) -%}"
    "{%- for message in messages -%}"
    "{%- if message['content'] is not defined or message['content'] is none -%}"
    "{%- set dpa.messages = dpa.messages + [message] -%}"
    "{%- else -%}"
    "{%- if message['content'] is string -%}"
    "{%- set dpa.text = message['content'] | replace('<image>', '@IMAGE@') -%}"
    "{%- else -%}"
    "{%- set dpa.text = '' -%}{%- set dpa.after_image = false -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' or part['type'] == 'image_url' -%}"
    "{%- set dpa.text = dpa.text + '@IMAGE@' -%}{%- set dpa.after_image = true -%}"
    "{%- elif part['type'] == 'text' -%}"
    "{%- set dpa.text = dpa.text + ('\\n' if dpa.after_image else '') + part['text'] -%}"
    "{%- set dpa.after_image = false -%}"
    "{%- else -%}"
    "{{- raise_exception('content parts are of type text or image, not ' ~ part['type']) -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- endif -%}"
    "{%- set dpa.messages = dpa.messages + [dict(message, content=dpa.text)] -%}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- set messages = dpa.messages -%}"
)
_PIN = "{{%- if {name} is not defined -%}}{{%- set {name} = {value} -%}}{{%- endif -%}}"
_LEADING_BOS = "{{- bos_token -}}"
_JOIN = "{{- '' }}"
"""Ends the prelude with an expression: after a block tag, transformers' Jinja would eat a newline of the original."""


def serving_template(
    template: str, image_token: str, *, pinned: Mapping[str, str | bool] | None = None, leading: bool = False
) -> str:
    """The template to train with, to save and to serve.

    Content may be a plain string, in which ``<image>`` stands for an image, or a list of typed parts
    (``{"type": "image"}``, ``{"type": "text", "text": ...}``); a newline goes between an image part and the text part
    that follows it. Other keys of a message are kept. A serving template comes back as it is.

    Args:
        template: the family's own Jinja template for plain strings.
        image_token: text of the placeholder.
        pinned: variables that get this value unless the caller gives one.
        leading: write BOS before everything (``families`` knows when).

    Raises:
        ModelError: the template writes today's date and nothing pins it, or ``image_token`` cannot be quoted.
    """
    if template.startswith(MARK):
        return template
    if set("'\\") & set(image_token):
        raise ModelError(f"image token {image_token!r} has a quote or a backslash and cannot stand in a template")
    pins = pinned or {}
    if "strftime_now" in template and not any(isinstance(value, str) for value in pins.values()):
        raise ModelError(
            "the chat template writes today's date (strftime_now): an answer would depend on the day, and training "
            "text would not be serving text. Name the template's date variable in the family's `pinned` "
            "(dpa.models.families), as Llama-3's row does"
        )
    parts = [_PRELUDE.replace("@IMAGE@", image_token)]
    parts += [_PIN.format(name=name, value=_literal(value)) for name, value in pins.items()]
    parts += [_LEADING_BOS] if leading else []
    return "".join([*parts, _JOIN, template])


_TYPED_PRELUDE = (
    MARK + "{%- set dpa = namespace(messages=[], parts=[], text='') -%}"
    "{%- for message in messages -%}"
    "{%- set dpa.parts = message['content'] -%}"
    "{%- if message['content'] is string -%}"
    "{%- set dpa.parts = [] -%}"
    "{%- for piece in message['content'].split('<image>') -%}"
    "{%- set dpa.text = piece -%}"
    "{%- if not loop.first -%}"
    "{%- set dpa.parts = dpa.parts + [{'type': 'image'}] -%}"
    "{%- if piece.startswith('\\n') -%}{%- set dpa.text = piece[1:] -%}{%- endif -%}"
    "{%- endif -%}"
    "{%- if dpa.text -%}{%- set dpa.parts = dpa.parts + [{'type': 'text', 'text': dpa.text}] -%}{%- endif -%}"
    "{%- endfor -%}"
    "{%- endif -%}"
    "{%- set dpa.messages = dpa.messages + [dict(message, content=dpa.parts)] -%}"
    "{%- endfor -%}"
    "{%- set messages = dpa.messages -%}"
)
"""The other way round, before a template that takes typed parts alone (llava-hf's): strings become parts."""


def typed_serving_template(template: str, image_token: str, *, leading: bool = False) -> str:
    """As :func:`serving_template`, around a template that knows typed parts alone and writes the image token itself.

    Args:
        template: the checkpoint's own.
        image_token: text of the placeholder.
        leading: write BOS before everything.

    Raises:
        ModelError: the template never writes ``image_token``.
    """
    if image_token not in template:
        raise ModelError(f"the chat template takes typed parts and writes no {image_token!r}: it cannot show an image")
    return "".join([_TYPED_PRELUDE, _LEADING_BOS if leading else "", _JOIN, template])


def _literal(value: str | bool) -> str:
    """A value in Jinja's spelling."""
    return f"'{value}'" if isinstance(value, str) else str(value).lower()


def check_template(
    tokenizer: Any,
    original: str,
    template: str,
    image_token: str,
    end_of_turn: str,
    *,
    pinned: Mapping[str, str | bool],
) -> None:
    """Renders a small conversation with both and compares: what training relies on, seen on this very tokenizer.

    Raises:
        ModelError: typed and plain content differ, the original's text changed, the placeholder is not there exactly
            once, an answer is not closed by ``end_of_turn`` or does not directly follow the generation prompt (where
            there is one), or the tokenizer adds something to the rendered text.
    """

    def render(content: Any, jinja: str, *, answered: bool = True, prompt: bool = False) -> str:
        turns = [{"role": "user", "content": content}, {"role": "assistant", "content": "ANSWER"}][: 1 + answered]
        text: str = tokenizer.apply_chat_template(
            turns, chat_template=jinja, tokenize=False, add_generation_prompt=prompt, **pinned
        )
        return text

    where = f"chat template of {tokenizer.name_or_path!r}"
    try:
        before, after = render("QUESTION", original), render("QUESTION", template)
        plain = render("<image>\nQUESTION", template)
        asked, prompt = (render("QUESTION", template, answered=False, prompt=prompt) for prompt in (False, True))
        typed = render([{"type": "image"}, {"type": "text", "text": "QUESTION"}], template)
    except TemplateError as error:
        raise ModelError(f"{where} does not render a user and an assistant turn: {error}") from None
    if after not in (before, f"{tokenizer.bos_token}{before}"):
        raise ModelError(f"{where}: with the prelude it renders {after!r}, without {before!r}; report this template")
    if typed != plain or plain.count(image_token) != 1:
        raise ModelError(f"{where}: typed parts give {typed!r}, the plain string {plain!r}, both must hold one image")
    if not plain.partition("ANSWER")[2].lstrip().startswith(end_of_turn):  # Llama-2 puts a space before it
        raise ModelError(
            f"{where} writes {plain.partition('ANSWER')[2]!r} after an answer, not {end_of_turn!r}: template and "
            "family do not fit; add a row to dpa.models.families or use the model's own template"
        )
    written = after.removeprefix(prompt).partition("ANSWER")[0]
    if prompt != asked and (not after.startswith(prompt) or written.strip()):  # some know no generation prompt
        raise ModelError(
            f"{where}: an answer in training does not follow what is served as its prompt: the prompt ends with "
            f"{prompt[-40:]!r}, the text goes {after.partition('ANSWER')[0][-40:]!r} before the answer. A model that "
            "always thinks aloud writes such templates; use its instruct version"
        )
    bare, served = (tokenizer(after, add_special_tokens=add)["input_ids"] for add in (False, True))
    if bare != served:
        raise ModelError(
            f"{where}: the tokenizer adds tokens to the rendered text ({len(bare)} ids in training, {len(served)} when "
            "served); put them into the template and remove the post_processor of tokenizer.json"
        )
