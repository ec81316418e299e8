"""The report's relevance maps: per sample its picture, and per step a row of tokens, all in one colour scale."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from dpa.analyze.explain import Token
from dpa.analyze.explain_page import Mark, full_colour, mark_of, signed
from dpa.analyze.maps import MapSample, StageMaps
from dpa.evaluate.tables import MISSING

TOKENS = 120
"""Of a longer text the first ones are shown: each stands on the page once per step and method."""
_OPEN = 2
"""Of so many methods all are unfolded, of more the first."""
_WEIGHED = ("cmo", "cal")
"""Objectives whose weights are those of training (prior asks another model, uniform has none)."""


@dataclass(frozen=True, slots=True)
class Step:
    """One row."""

    step: int
    answers: tuple[tuple[tuple[Mark, str], ...], ...]
    """Per answer its tokens, each with all its numbers in words."""
    summary: str


@dataclass(frozen=True, slots=True)
class MethodSteps:
    """A sample under one method."""

    method: str
    steps: tuple[Step, ...]
    table: tuple[tuple[str, tuple[str, ...]], ...]
    """Token -> relevance at each step."""
    unfolded: bool
    shown: int
    tokens: int


@dataclass(frozen=True, slots=True)
class SampleMaps:
    """A sample under all methods of a stage."""

    stage: str
    name: str
    """Its number and file; folders are left out."""
    prompts: tuple[str, ...]
    pictures: tuple[tuple[str, bool], ...]
    methods: tuple[MethodSteps, ...]


@dataclass(frozen=True, slots=True)
class Maps:
    """All that the section shows."""

    samples: tuple[SampleMaps, ...]
    scale: float
    """Relevance of full colour."""
    signed: bool
    """Whether any is negative."""
    truth: bool
    """Whether visual words are known."""
    unknown: bool
    """Whether a token has no prediction without the image."""


def maps_of(methods: Mapping[str, Sequence[StageMaps]]) -> Maps:
    """What the report draws of the stages' files (``analyze.maps.read_maps``), the main method first."""
    tokens = [
        token
        for stages in methods.values()
        for stage in stages
        for sample in stage.samples
        for _, own in sample.steps
        for token in own[:TOKENS]
    ]
    scale = full_colour(tokens)
    return Maps(
        samples=tuple(_samples(methods, scale)),
        scale=scale,
        signed=any(token.relevance is not None and token.relevance < 0 for token in tokens),
        truth=any(token.visual is not None for token in tokens),
        unknown=any(token.relevance is None for token in tokens),
    )


def _samples(methods: Mapping[str, Sequence[StageMaps]], scale: float) -> Iterator[SampleMaps]:
    """Stage by stage; the same sample of several methods is one."""
    found: dict[tuple[str, str], dict[str, tuple[str, MapSample]]] = {}
    for method, stages in methods.items():
        for stage in stages:
            for sample in stage.samples:
                if sample.steps:
                    found.setdefault((stage.stage, sample.name), {})[method] = stage.objective, sample
    order = list(dict.fromkeys(stage for stage, _ in found))
    for (stage_name, name), of in sorted(found.items(), key=lambda item: order.index(item[0][0])):
        _, first = next(iter(of.values()))
        yield SampleMaps(
            stage=stage_name,
            name=re.sub(r"[^\s(]*/", "", name),
            prompts=tuple(prompt for prompt in first.prompts if prompt),
            pictures=first.pictures,
            methods=tuple(
                _method(method, objective, sample, scale, unfolded=place == 0 or len(of) <= _OPEN)
                for place, (method, (objective, sample)) in enumerate(of.items())
            ),
        )


def _method(method: str, objective: str, sample: MapSample, scale: float, *, unfolded: bool) -> MethodSteps:
    columns = [tokens[:TOKENS] for _, tokens in sample.steps]
    return MethodSteps(
        method=method,
        steps=tuple(_step(step, tokens[:TOKENS], objective, scale) for step, tokens in sample.steps),
        table=tuple(
            (mark_of(row[0], scale).body, tuple(mark_of(token, scale).relevance for token in row))
            for row in zip(*columns, strict=True)
        ),
        unfolded=unfolded,
        shown=len(columns[0]),
        tokens=len(sample.steps[0][1]),
    )


def _step(step: int, tokens: Sequence[Token], objective: str, scale: float) -> Step:
    answers = []
    for _, own in groupby(tokens, key=lambda token: token.segment):
        marks = []
        for token in own:
            mark = mark_of(token, scale)
            marks.append((mark, _about(mark, step, weighed=objective in _WEIGHED)))
        answers.append(tuple(marks))
    return Step(step=step, answers=tuple(answers), summary=_summary(tokens))


def _about(mark: Mark, step: int, *, weighed: bool) -> str:
    parts = [
        f"{mark.body}  ·  step {step}: relevance {mark.relevance}",
        f"p with image {mark.p_with}, without {mark.p_without}",
        *([f"weight {mark.weight}"] if weighed else []),
        *(["visual word"] if mark.visual else []),
    ]
    return "  ·  ".join(parts)


def _summary(tokens: Sequence[Token]) -> str:
    """Mean relevance: of visual words and the others where that is known."""
    if any(token.visual for token in tokens):
        return f"visual {_mean(tokens, visual=True)}, other {_mean(tokens, visual=False)}"
    return f"mean {_mean(tokens, visual=None)}"


def _mean(tokens: Sequence[Token], *, visual: bool | None) -> str:
    values = [
        token.relevance
        for token in tokens
        if token.relevance is not None and (visual is None or bool(token.visual) is visual)
    ]
    return signed(sum(values) / len(values)) if values else MISSING
