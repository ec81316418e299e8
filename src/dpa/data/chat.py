"""From a sample to token ids, with what is supervised and where the images are.

The text is the one that is served: the same template, tokenised in one piece. Reasons why a sample cannot be used are
DataErrors that start with a short fixed phrase and a colon, by which the audit counts them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

from jinja2.exceptions import TemplateError

from dpa.data.samples import IMAGE_MARKER, Sample, Spans
from dpa.errors import DataError
from dpa.types import TextRules

ENCODING_VERSION = 1
"""Raise it when the same sample no longer gives the same ids: cached audits are then redone."""

Message = dict[str, str]


@dataclass(frozen=True, slots=True)
class Encoded:
    """One sample as tokens. T tokens, image placeholders included."""

    input_ids: list[int]
    """Length T."""
    supervised: list[bool]
    """Length T; the label of token t is the token itself, predicted at t - 1. Never at 0, never in an image."""
    image_spans: tuple[tuple[int, int], ...]
    """Per image: first placeholder and one past the last."""
    cut: int = 0
    """Tokens beyond ``max_length`` that were cut away."""
    marked: list[bool] | None = None
    """Length T: the token overlaps one of the sample's ``visual_spans``; None: not asked for, or not marked."""


@dataclass(frozen=True, slots=True)
class _Control:
    """Tokens that steer the model, of one tokenizer."""

    pattern: re.Pattern[str]
    ids: frozenset[int]
    """Without the unknown token: any odd character may become that."""


_controls: WeakKeyDictionary[Any, dict[tuple[str, str, int], _Control]] = WeakKeyDictionary()


def _control_of(tokenizer: Any, rules: TextRules) -> _Control:
    """Special tokens of the tokenizer, end of turn and image token; computed once per tokenizer."""
    known = _controls.setdefault(tokenizer, {})
    key = (rules.image_token, rules.end_of_turn, len(tokenizer))
    if key not in known:
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        texts = sorted({*special, rules.image_token, rules.end_of_turn}, key=len, reverse=True)
        ids = {int(tokenizer.convert_tokens_to_ids(text)) for text in texts}
        known[key] = _Control(
            pattern=re.compile("|".join(map(re.escape, texts))), ids=frozenset(ids - {tokenizer.unk_token_id})
        )
    return known[key]


# Plain: captions


def encode_plain(
    sample: Sample,
    tokenizer: Any,
    rules: TextRules,
    *,
    max_length: int,
    with_image: bool,
    document_start: bool = False,
    marks: bool = False,
) -> Encoded:
    """``[BOS] [image placeholders] caption newline``; the caption and its newline are supervised.

    The user's prompt is dropped (LLaVA's ``plain`` version; paper, stages 1 and 2). Control tokens that a caption
    spells out are tokenised as ordinary text.

    Args:
        sample: with one assistant turn, the caption.
        tokenizer: a fast tokenizer of transformers.
        rules: from ``models.families.text_rules``.
        max_length: T at most.
        with_image: False leaves images out (stage 1).
        document_start: of a family without BOS, begin with the token that starts its documents, so that the caption's
            first token is learned where the text-only pass of stage 2 will ask for it.
        marks: also which tokens the sample marks as visual.

    Raises:
        DataError: the sample cannot be used; the message is the reason alone, without the sample's name.
    """
    answers = [turn.text for turn in sample.turns if turn.role == "assistant"]
    if len(answers) != 1:
        raise DataError(f"not a caption: {len(answers)} assistant turns, a caption has one; use format: chat")
    if not answers[0].strip():
        raise DataError("nothing to learn: the caption is empty")
    if with_image:
        _check_markers(sample)
    if marks and sample.images and sample.visual_spans is None:
        raise DataError("not marked: objective spans needs visual_spans in every caption with an image; [] if none")
    first = rules.document_start_id if document_start and rules.bos_id is None else rules.bos_id
    ids = [] if first is None else [first]
    spans = []
    for _ in sample.images if with_image else ():
        spans.append((len(ids), len(ids) + rules.image_tokens))
        ids += [rules.image_token_id] * rules.image_tokens
    start = len(ids)
    read = tokenizer(
        f"{answers[0]}\n",
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
        return_offsets_mapping=marks,
        verbose=False,
    )
    caption: list[int] = read["input_ids"]
    _check_control(caption, tokenizer, rules)
    ids += caption
    encoded = _finish(ids, [place >= start for place in range(len(ids))], spans, max_length)
    if not marks or sample.visual_spans is None:
        return encoded
    marked = [False] * start + visual_tokens(sample.visual_spans, answers[0], read["offset_mapping"])
    return replace(encoded, marked=marked[: len(encoded.input_ids)])


def visual_tokens(spans: Spans, text: str, offsets: Sequence[tuple[int, int]]) -> list[bool]:
    """For each token, given as characters of ``text``: whether it overlaps a span.

    Raises:
        DataError: a span ends beyond the text.
    """
    if any(end > len(text) for _, end in spans):
        raise DataError(f"visual_spans beyond the text: {max(end for _, end in spans)} of {len(text)} characters")
    return [any(begin < last and first < end for first, last in spans) for begin, end in offsets]


def _check_control(ids: Sequence[int], tokenizer: Any, rules: TextRules) -> None:
    """For tokenizers that give a control token even where they were told to split it."""
    found = _control_of(tokenizer, rules).ids.intersection(ids)
    if found:
        raise DataError(f"control token in text: {tokenizer.convert_ids_to_tokens(min(found))!r}; remove it")


# Chat: instructions


def encode_chat(sample: Sample, tokenizer: Any, rules: TextRules, *, max_length: int) -> Encoded:
    """The conversation in the family's chat template; each answer and its end-of-turn token are supervised.

    The ids are those of the saved processor for the same conversation. What counts as the answer comes from the
    template itself: what follows its generation prompt, up to and with the end-of-turn token.

    Args:
        sample: any conversation that the template accepts.
        tokenizer: a fast tokenizer of transformers.
        rules: from ``models.families.text_rules``.
        max_length: T at most.

    Raises:
        DataError: the sample cannot be used; the message is the reason alone, without the sample's name.
    """
    messages = [{"role": turn.role, "content": turn.text} for turn in sample.turns]
    answers = [message for message in messages if message["role"] == "assistant"]
    if not answers:
        raise DataError("nothing to learn: no assistant turn")
    if not any(answer["content"].strip() for answer in answers):
        raise DataError("nothing to learn: every assistant turn is empty")
    _check_markers(sample)
    control = _control_of(tokenizer, rules)
    for message in messages:
        for text in message["content"].split(IMAGE_MARKER):
            if match := control.pattern.search(text):
                raise DataError(
                    f"control token in text: {match.group()!r} in a {message['role']} turn would steer the model; "
                    "remove or respell it"
                )
    text = _render(messages, tokenizer, rules)
    spans = _answer_spans(messages, text, tokenizer, rules)
    return _tokenise(text, spans, len(sample.images), tokenizer, rules, max_length)


def _check_markers(sample: Sample) -> None:
    if sample.markers != len(sample.images):
        raise DataError(
            f"images and markers differ: {len(sample.images)} image(s), {sample.markers} {IMAGE_MARKER} marker(s); "
            "write one marker per image"
        )


def _render(messages: Sequence[Message], tokenizer: Any, rules: TextRules, *, prompt: bool = False) -> str:
    """The conversation as text, image tokens in the place of markers."""
    try:
        text: str = tokenizer.apply_chat_template(
            list(messages), chat_template=rules.chat_template, tokenize=False, add_generation_prompt=prompt
        )
    except (TemplateError, TypeError) as error:
        roles = ", ".join(message["role"] for message in messages)
        raise DataError(
            f"chat template refuses: {error} (turns: {roles}); change the turns or choose another LLM"
        ) from None
    return text.replace(IMAGE_MARKER, rules.image_token)


def _answer_spans(
    messages: Sequence[Message], text: str, tokenizer: Any, rules: TextRules
) -> Iterator[tuple[int, int]]:
    """Per assistant turn: where in ``text`` the answer starts, and where its end-of-turn token ends."""
    for place, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = messages[:place]
        if not any(earlier["role"] == "user" for earlier in before):
            raise DataError("chat template refuses: the conversation starts with an answer; begin with a user turn")
        prompt = _render(before, tokenizer, rules, prompt=True)
        if not text.startswith(prompt):  # some generation prompts open a block that past answers do not have
            prompt = _render(before, tokenizer, rules)
        if not text.startswith(prompt):
            raise DataError(
                f"chat template unsuitable: the text of turn {place + 1} and those before it changes with what "
                "follows, so answers cannot be located; give the LLM's family a template of its own"
            )
        end = text.find(rules.end_of_turn, len(prompt))
        answer = message["content"].replace(IMAGE_MARKER, rules.image_token).strip()
        written = text[len(prompt) : end].rstrip() if end >= 0 else ""
        if end < 0 or not written.endswith(answer):
            raise DataError(
                f"chat template unsuitable: after turn {place + 1}'s prompt it writes "
                f"{text[len(prompt) : len(prompt) + 80]!r}, not the answer closed by {rules.end_of_turn}; "
                "give the LLM's family a template of its own"
            )
        yield _start_of(written, answer, len(prompt)), end + len(rules.end_of_turn)


def _start_of(written: str, answer: str, offset: int) -> int:
    """Where supervision starts: white space that the template puts between its prompt and the answer is the answer's.

    Vicuna's prompt ends with ``ASSISTANT:``, its answers start with a space that is one token with the first word.
    Anything else in between (a header that the prompt lacks, an empty block of thoughts) is not the model's to write.
    """
    gap = written[: len(written) - len(answer)]
    return offset if not gap.strip() else offset + len(gap.rstrip(" "))


def _tokenise(
    text: str, spans: Iterator[tuple[int, int]], images: int, tokenizer: Any, rules: TextRules, max_length: int
) -> Encoded:
    """Tokenises the whole text once, then writes each image token as often as an image has rows.

    A special token is matched before anything else and parts its surroundings, so the repetition changes no other id:
    the same as repeating it in the text, as the processor does, for a fraction of the work.
    """
    encoding = tokenizer(
        text, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False, verbose=False
    )
    answers = list(spans)
    control = _control_of(tokenizer, rules)
    ids: list[int] = []
    supervised: list[bool] = []
    image_spans: list[tuple[int, int]] = []
    current = 0
    for token, (start, end) in zip(encoding["input_ids"], encoding["offset_mapping"], strict=True):
        if token == rules.image_token_id and text[start:end].strip() == rules.image_token:
            image_spans.append((len(ids), len(ids) + rules.image_tokens))
            ids += [token] * rules.image_tokens
            supervised += [False] * rules.image_tokens
            continue
        if token in control.ids and not control.pattern.search(text, start, end):
            raise DataError(  # contents hold no control token: one that the text does not spell out came from them
                f"control token in text: the tokenizer reads {text[start:end]!r} as "
                f"{tokenizer.convert_ids_to_tokens(token)!r}; remove or respell it"
            )
        while current < len(answers) and start >= answers[current][1]:
            current += 1
        ids.append(token)
        # end: byte-level tokenizers may report a space of the prompt as an empty range at the answer's first character
        inside = current < len(answers) and start >= answers[current][0] and end > answers[current][0]
        supervised.append(inside)
    if len(image_spans) != images:
        raise DataError(
            f"chat template unsuitable: {images} image(s) in the sample, {len(image_spans)} in the rendered text"
        )
    return _finish(ids, supervised, image_spans, max_length)


# Both


def _finish(ids: list[int], supervised: list[bool], spans: list[tuple[int, int]], max_length: int) -> Encoded:
    """Cuts at ``max_length`` and checks that something is left to learn."""
    images_end = spans[-1][1] if spans else 0
    if images_end > max_length:
        raise DataError(
            f"too long: {images_end} tokens up to the end of the last image, max_length is {max_length}; "
            "an image is never cut: raise max_length"
        )
    cut = max(0, len(ids) - max_length)
    ids, supervised = ids[:max_length], supervised[:max_length]
    if supervised:
        supervised[0] = False  # nothing comes before it that could predict it
    if not any(supervised):
        raise DataError(
            f"no supervised token: none of {len(ids)} tokens ({cut} more were cut at max_length {max_length}) "
            "belongs to an answer"
        )
    return Encoded(input_ids=ids, supervised=supervised, image_spans=tuple(spans), cut=cut)
