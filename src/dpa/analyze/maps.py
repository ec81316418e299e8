"""``maps.jsonl``: the relevance of a few samples' tokens at a few steps of a stage, written and read.

Per stage a line of kind ``samples`` (what is the same at every step: pictures, questions, tokens), then one of kind
``map`` for each step (the numbers). ``pipeline.maps`` writes while a stage trains, the report reads.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dpa.analyze.explain import Explanation, Token
from dpa.analyze.explain_page import embedded
from dpa.objectives import relevance
from dpa.store import disk_errors, write_text

_DIGITS = 5


@dataclass(frozen=True, slots=True)
class MapSample:
    """One sample over a stage's steps."""

    name: str
    prompts: tuple[str, ...]
    """Per answer; empty text for a caption."""
    pictures: tuple[tuple[str, bool], ...]
    """Data URI, and whether it is small."""
    steps: tuple[tuple[int, tuple[Token, ...]], ...]
    """Step -> its tokens, ascending. Their ``relevance`` is p with image minus p without, whatever the objective."""


@dataclass(frozen=True, slots=True)
class StageMaps:
    """A stage's samples."""

    stage: str
    objective: str
    """The stage's own; where it is ``uniform`` the weights are those that CMO would have given."""
    samples: tuple[MapSample, ...]


def head_line(stage: str, objective: str, explanations: Sequence[Explanation]) -> dict[str, Any]:
    """What stays the same at every step."""
    return {
        "kind": "samples",
        "stage": stage,
        "objective": objective,
        "samples": [
            {
                "name": one.sample,
                "prompts": list(one.prompts),
                "pictures": [list(embedded(picture)) for picture in one.pictures],
                "text": [token.text for token in one.tokens],
                "segment": [token.segment for token in one.tokens],
                "visual": [token.visual for token in one.tokens],
            }
            for one in explanations
        ],
    }


def step_line(stage: str, step: int, explanations: Sequence[Explanation], *, seconds: float) -> dict[str, Any]:
    """The numbers of one step. ``seconds``: what it cost to make them."""
    return {
        "kind": "map",
        "stage": stage,
        "step": step,
        "seconds": round(seconds, 3),
        "samples": [
            {
                "logp_with": [_rounded(token.logp_with) for token in one.tokens],
                "logp_without": [_rounded(token.logp_without) for token in one.tokens],
                "weight": [_rounded(token.weight) for token in one.tokens],
            }
            for one in explanations
        ],
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, _DIGITS)


def write_maps(path: Path, head: Mapping[str, Any], line: Mapping[str, Any]) -> None:
    """Adds a step to a stage's file. Lines of the same or later steps (a continued stage makes them again) give way, as
    does everything of other samples.

    Raises:
        StorageError, UserError: the disk is full or not writable.
    """
    before = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    first = json.dumps(head)
    same = before[:1] == [first]
    kept = [text for text in before[1:] if same and json.loads(text)["step"] < line["step"]]
    with disk_errors(path):
        write_text(path, "\n".join([first, *kept, json.dumps(line)]) + "\n")


def read_maps(lines: Iterable[Mapping[str, Any]]) -> list[StageMaps]:
    """The stages of a method, in the order of their lines."""
    heads: dict[str, Mapping[str, Any]] = {}
    steps: dict[str, list[Mapping[str, Any]]] = {}
    for line in lines:
        stage = str(line["stage"])
        if line["kind"] == "samples":
            heads[stage], steps[stage] = line, []
        elif stage in heads:
            steps[stage].append(line)
    return [
        StageMaps(
            stage=stage,
            objective=str(head["objective"]),
            samples=tuple(_sample(place, sample, steps[stage]) for place, sample in enumerate(head["samples"])),
        )
        for stage, head in heads.items()
    ]


def _sample(place: int, sample: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> MapSample:
    return MapSample(
        name=str(sample["name"]),
        prompts=tuple(sample["prompts"]),
        pictures=tuple((str(uri), bool(small)) for uri, small in sample["pictures"]),
        steps=tuple((int(line["step"]), _tokens(sample, line["samples"][place])) for line in lines),
    )


def _tokens(sample: Mapping[str, Any], numbers: Mapping[str, Any]) -> tuple[Token, ...]:
    with_N, without_N = (
        torch.tensor([torch.nan if value is None else value for value in numbers[name]], dtype=torch.float64)
        for name in ("logp_with", "logp_without")
    )
    gained = relevance("cmo", with_N, without_N).tolist()
    columns = zip(
        sample["text"],
        numbers["logp_with"],
        numbers["logp_without"],
        gained,
        numbers["weight"],
        sample["segment"],
        sample["visual"],
        strict=True,
    )
    return tuple(
        Token(text, logp, without, None if without is None else gain, weight, segment, visual)
        for text, logp, without, gain, weight, segment, visual in columns
    )
