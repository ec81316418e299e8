"""Options of a multiple-choice question by the log-probability that the model answers with them. Nothing is generated.

**Which figure decides.** ``logp`` is the log-probability of the whole answer: the option's tokens and then the end of
the turn. So measured, options are exclusive events ("two" is not the beginning of "two red"), their probabilities add
up to at most 1, and the largest is what the model would say if it could say nothing else. That is what ``best`` is
taken from. ``logp_per_token`` is the mean over the same tokens, which other tools use to correct sums without an end
of turn for their length; it favours long options whose later tokens follow from their first. It is reported beside.

Legend: B rows of a batch (a question and one of its options each), L padded length, K columns of logits that are
computed, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import ProcessorMixin

from dpa.errors import DataError, ModelError
from dpa.evaluate.asking import (
    Asked,
    Question,
    adds_special_tokens,
    asked_digests,
    batches,
    check_ids,
    digest,
    encode,
    naming,
    open_images,
    render,
)
from dpa.evaluate.devices import Answerer, identity_of, spread
from dpa.evaluate.generate import Progress, answering, end_ids, out_of_batch, run_digest
from dpa.evaluate.predictions import PredictionFile


@dataclass(frozen=True, slots=True)
class Choices:
    """A question and what it may be answered with."""

    question: Question
    options: tuple[str, ...]
    """Texts as the model would write them: letters where the question asks for a letter."""


@dataclass(frozen=True, slots=True)
class Ranking:
    """What the model thinks of each option."""

    id: str
    best: int
    """Index of the option with the largest ``logp``; the first of equals."""
    logp: tuple[float, ...]
    """Per option, in nats: of all its tokens and the end of the turn."""
    logp_per_token: tuple[float, ...]
    """The same over the number of those tokens."""

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Ranking | None:
        """See :class:`dpa.evaluate.predictions.Record`."""
        sums, means = record.get("logp"), record.get("logp_per_token")
        if not isinstance(record.get("id"), str) or not isinstance(record.get("best"), int):
            return None
        if not all(isinstance(of, list) and of and all(isinstance(x, float) for x in of) for of in (sums, means)):
            return None
        assert isinstance(sums, list)
        assert isinstance(means, list)
        return cls(id=record["id"], best=record["best"], logp=tuple(sums), logp_per_token=tuple(means))


@dataclass(frozen=True, slots=True)
class _Row:
    """A question with one of its options as the answer."""

    item: Asked
    """``text`` goes on to the option's end; ``length`` counts it."""
    number: int
    """Which option."""
    answer: int
    """Tokens at the end of ``text`` that are scored."""


@dataclass(frozen=True, slots=True)
class _Job:
    rows: tuple[_Row, ...]


_Logp = tuple[str, int, float, int]
"""Question id, number of the option, log-probability, tokens."""


def rank_options(
    model: Answerer,
    processor: ProcessorMixin,
    choices: Sequence[Choices],
    *,
    batch_size: int,
    with_image: bool = True,
    out: Path | None = None,
    progress: Progress | None = None,
    identity: str | None = None,
) -> list[Ranking]:
    """Scores every option as the assistant's turn after its question.

    An option is written where the chat template writes answers (Vicuna: after a space). Its tokens are those of the
    whole conversation that no option of the question shares with the bare prompt: were one to melt into the prompt's
    last token, that token is scored for all. Rows are padded on the right; in float32 batched figures are those of
    single rows.

    Args:
        model: as for ``generate_answers``.
        processor: with a chat template.
        choices: two options or more each, all different.
        batch_size: B, options per forward.
        with_image: False ranks by the text alone.
        out: JSONL of rankings, appended to as questions are done; the same call after a kill goes on.
        progress: called with (questions done, all).
        identity: digest of the weights where the caller knows it.

    Returns:
        One ranking per question, in their order.

    Raises:
        DataError: ids twice, fewer than two options, an empty one or two alike; an image cannot be read.
        ModelError: no chat template.
        DpaError: anything else that fails; names the question.
        StorageError: ``out`` cannot be written.
    """
    check_ids([item.question for item in choices])
    rows = {item.question.id: _rows(processor, item, with_image) for item in choices}
    done: dict[str, Ranking] = {}
    with ExitStack() as stack:
        file, digests = None, {}
        if out is not None:
            weights = identity_of(model) if identity is None else identity
            file = stack.enter_context(PredictionFile(out, run_digest(weights, processor, "options"), Ranking))
            digests = _digests(rows)
            done = file.restore(digests)
        if progress is not None:
            progress(len(done), len(choices))
        left = {name: of for name, of in rows.items() if name not in done}
        found: dict[str, list[_Logp]] = {}
        for logps in spread(model, processor, _score, _jobs(list(left.values()), batch_size)):
            whole = []
            for logp in logps:
                own = found.setdefault(logp[0], [])
                own.append(logp)
                if len(own) == len(rows[logp[0]]):
                    whole.append(_ranking(found.pop(logp[0])))
            if file is not None and whole:
                file.append(whole, digests)
            done |= {item.id: item for item in whole}
            if progress is not None:
                progress(len(done), len(choices))
    return [done[item.question.id] for item in choices]


def _rows(processor: ProcessorMixin, choices: Choices, with_image: bool) -> list[_Row]:
    question, options = choices.question, choices.options
    if len(options) < 2 or len(set(options)) < len(options) or not all(option.strip() for option in options):
        raise DataError(f"{question.named()}: two options or more are needed, all different, none empty: {options}")
    images = question.images if with_image else ()
    prompt = render(processor, question, with_image=with_image)
    texts = [_with_answer(processor, question, prompt, option, with_image) for option in options]
    with naming(question, "tokenising"):
        special = adds_special_tokens(processor.tokenizer, prompt)
        before = processor.tokenizer(prompt, add_special_tokens=special)["input_ids"]
        ids = [processor.tokenizer(text, add_special_tokens=special)["input_ids"] for text in texts]
    shared = min(len(_shared(before, of)) for of in ids)
    return [
        _Row(Asked(question, text, len(of), images), number, len(of) - shared)
        for number, (text, of) in enumerate(zip(texts, ids, strict=True))
    ]


def _shared(first: list[int], second: list[int]) -> list[int]:
    """The common beginning."""
    count = next((n for n, (one, two) in enumerate(zip(first, second, strict=False)) if one != two), None)
    return first[: min(len(first), len(second)) if count is None else count]


def _with_answer(processor: ProcessorMixin, question: Question, prompt: str, option: str, with_image: bool) -> str:
    """The conversation up to the option's end, written as the template writes an answer."""
    whole = render(processor, question, with_image=with_image, answer=option)
    if whole.startswith(prompt) and option in whole[len(prompt) :]:
        end = whole.index(option, len(prompt)) + len(option)
        return whole[:end]
    return prompt + option  # the template writes past turns otherwise than the one to come (thinking models)


def _jobs(questions: Sequence[Sequence[_Row]], batch_size: int) -> list[_Job]:
    """Options of a question side by side, so that its images are opened once; questions by length, longest first."""
    by_id = {of[0].item.question.id: of for of in questions}
    longest = [max((row.item for row in of), key=lambda item: item.length) for of in questions]
    jobs = []
    for items in batches(longest, max(len(longest), 1)):
        rows = [row for item in items for row in by_id[item.question.id]]
        jobs += [_Job(tuple(rows[start : start + batch_size])) for start in range(0, len(rows), batch_size)]
    return jobs


@torch.no_grad()
def _score(model: Any, processor: ProcessorMixin, job: _Job) -> list[_Logp]:
    rows = job.rows
    if model.config.is_encoder_decoder:
        raise ModelError(f"options cannot be ranked with {type(model).__name__}: it is no decoder of prompt and answer")
    images = []
    for _, alike in groupby(rows, key=lambda row: row.item.question.id):
        same = list(alike)
        images += [open_images(same[0].item)] * len(same)
    items = [row.item for row in rows]
    inputs = encode(processor, items, images, side="right").to(model.device, dtype=model.dtype)
    ids_BL, end_B = inputs["input_ids"], inputs["attention_mask"].sum(dim=1)
    start_B = end_B - torch.tensor([row.answer for row in rows], device=end_B.device)
    first = int(start_B.min()) - 1  # the position that predicts the first token of an answer
    with answering(model, processor), out_of_batch(items):
        logits_BKV = _logits(model, inputs, ids_BL.shape[1] - first)
        ends = sorted(end_ids(model, processor))
    logp_BKV = logits_BKV.float().log_softmax(dim=-1)
    found = []
    for number, row in enumerate(rows):
        start, end = int(start_B[number]), int(end_B[number])
        answer = logp_BKV[number, start - 1 - first : end - 1 - first]
        total = answer.gather(1, ids_BL[number, start:end, None]).sum()
        if ends:
            total = total + logp_BKV[number, end - 1 - first, ends].logsumexp(0)
        found.append((row.item.question.id, row.number, float(total), row.answer + bool(ends)))
    return found


def _logits(model: Any, inputs: Mapping[str, Any], last: int) -> Tensor:
    """[B, K, V], K = ``last``: of the last positions."""
    # most models can leave the other positions' logits out, which would be the largest tensor by far
    keeps = {"logits_to_keep": last} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    logits_BKV: Tensor = model(**inputs, **keeps).logits
    return logits_BKV[:, -last:]


def _ranking(logps: Sequence[_Logp]) -> Ranking:
    ordered = sorted(logps, key=lambda logp: logp[1])
    sums = tuple(logp for _, _, logp, _ in ordered)
    return Ranking(
        id=ordered[0][0],
        best=max(range(len(sums)), key=lambda number: sums[number]),
        logp=sums,
        logp_per_token=tuple(logp / tokens for _, _, logp, tokens in ordered),
    )


def _digests(rows: Mapping[str, Sequence[_Row]]) -> dict[str, str]:
    """Question id -> digest over all its options' texts and its images' bytes."""
    images = asked_digests([replace(of[0].item, text="") for of in rows.values()])
    return {name: digest([images[name], [row.item.text for row in of]]) for name, of in rows.items()}
