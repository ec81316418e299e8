"""Explanations as one HTML file: opens anywhere, offline, without scripts; hover, tap and keyboard show the numbers."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from dpa.analyze.explain import Explanation, Health, Token, health_of
from dpa.evaluate.tables import MISSING
from dpa.store import write_output

_PIXELATED_SIDE = 160
"""Pictures up to so many pixels a side are enlarged with hard edges."""
_EMBEDDED_SIDE = 640
"""Larger pictures are scaled down before they are embedded."""
PART_OF_CHARACTER = "▫"
"""Shown for a token that holds a part of a character only; the character stands at its last token."""
FORMULAS = {
    "cmo": "p with image − p without",
    "cal": "logit with image − logit without",
    "prior": "1 − p without image",
}


@dataclass(frozen=True, slots=True)
class Mark:
    """A token as it is drawn."""

    lead: str
    """White space before it."""
    body: str
    tail: str
    share: float
    """Strength of the colour, 0 to 1."""
    negative: bool
    unknown: bool
    visual: bool
    about: str
    """All numbers in words."""
    p_with: str
    p_without: str
    relevance: str
    weight: str


@dataclass(frozen=True, slots=True)
class _Answer:
    prompt: str
    marks: tuple[Mark, ...]


@dataclass(frozen=True, slots=True)
class _Column:
    checkpoint: str
    facts: tuple[tuple[str, str], ...]
    answers: tuple[_Answer, ...]


@dataclass(frozen=True, slots=True)
class _Row:
    sample: str
    pictures: tuple[tuple[str, bool], ...]
    """Data URI, and whether it is small."""
    columns: tuple[_Column, ...]
    truth: bool


def page(rows: Sequence[tuple[Explanation, ...]], *, title: str = "What the image adds") -> str:
    """The HTML.

    Args:
        rows: samples; each under one or more models, side by side. All of one rule: they share one colour scale.
        title: of the page; may hold any text.

    Raises:
        UserError: no rows, or explanations of different rules.
    """
    everything = [explanation for row in rows for explanation in row]
    rule = everything[0].rule if everything else None
    pooled = health_of(everything)  # refuses mixtures
    assert rule is not None
    scale = scale_of(everything)
    environment = Environment(
        loader=PackageLoader("dpa.analyze"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template("explain.html.j2").render(
        title=title,
        rule=rule,
        formula=FORMULAS[rule.kind],
        scale=scale,
        signed=any(token.relevance is not None and token.relevance < 0 for e in everything for token in e.tokens),
        rows=[_row(row, scale) for row in rows],
        truth=any(token.visual is not None for explanation in everything for token in explanation.tokens),
        summary=_summary(rows) if len(rows) > 1 else (),
        modes=sorted({explanation.image_mode for explanation in everything}),
        tokens=pooled.tokens,
    )


def write_page(path: Path, rows: Sequence[tuple[Explanation, ...]], *, title: str = "What the image adds") -> None:
    """:func:`page` as a file. Raises StorageError, UserError where it cannot be written."""
    html = page(rows, title=title)
    write_output(path, html)


def scale_of(explanations: Sequence[Explanation]) -> float:
    """:func:`full_colour` of all tokens."""
    return full_colour(token for explanation in explanations for token in explanation.tokens)


def full_colour(tokens: Iterable[Token]) -> float:
    """The relevance that gets the full colour: the largest shown, rounded up to 1, 2 or 5 times a power of ten."""
    largest = max((abs(token.relevance) for token in tokens if token.relevance is not None), default=0.0)
    if not 0 < largest < math.inf:
        return 1.0
    power = 10.0 ** math.floor(math.log10(largest))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= largest * (1 - 1e-9))


def _summary(rows: Sequence[tuple[Explanation, ...]]) -> tuple[tuple[str, tuple[tuple[str, str], ...]], ...]:
    """Per model the health of all its samples."""
    named: dict[str, list[Explanation]] = {}
    for row in rows:
        for explanation in row:
            named.setdefault(explanation.checkpoint, []).append(explanation)
    return tuple((name, facts_of(health_of(of))) for name, of in named.items())


def facts_of(health: Health) -> tuple[tuple[str, str], ...]:
    """Names and values for people."""
    facts = [
        ("tokens", str(health.tokens)),
        ("mean relevance", MISSING if health.mean_relevance is None else signed(health.mean_relevance)),
        ("mean weight", f"{health.mean_weight:.3f}"),
        ("at lower bound", f"{100 * health.share_at_minimum:.0f} %"),
        ("at upper bound", f"{100 * health.share_at_maximum:.0f} %"),
    ]
    if health.auc is not None:
        facts.append(("ROC-AUC (truth)", f"{health.auc:.2f}"))
    return tuple(facts)


def _row(row: tuple[Explanation, ...], scale: float) -> _Row:
    first = row[0]
    return _Row(
        sample=first.sample,
        pictures=tuple(embedded(picture) for picture in first.pictures),
        columns=tuple(_column(explanation, scale) for explanation in row),
        truth=any(token.visual is not None for explanation in row for token in explanation.tokens),
    )


def _column(explanation: Explanation, scale: float) -> _Column:
    answers = []
    for segment, tokens in groupby(explanation.tokens, key=lambda token: token.segment):
        prompt = explanation.prompts[segment] if segment < len(explanation.prompts) else ""
        answers.append(_Answer(prompt, tuple(mark_of(token, scale) for token in tokens)))
    return _Column(explanation.checkpoint, facts_of(explanation.health), tuple(answers))


def mark_of(token: Token, scale: float) -> Mark:
    """A token's text, colour and numbers; ``scale``: see :func:`full_colour`."""
    lead, body, tail = parts_of(token.text)
    p_with = probability(token.logp_with)
    p_without = MISSING if token.logp_without is None else probability(token.logp_without)
    number = MISSING if token.relevance is None else signed(token.relevance)
    return Mark(
        lead=lead,
        body=body,
        tail=tail,
        share=0.0 if token.relevance is None else round(min(1.0, abs(token.relevance) / scale), 3),
        negative=token.relevance is not None and token.relevance < 0,
        unknown=token.relevance is None,
        visual=bool(token.visual),
        about=f"{body}: relevance {number}, p with image {p_with}, without {p_without}, weight {token.weight:.3f}",
        p_with=p_with,
        p_without=p_without,
        relevance=number,
        weight=f"{token.weight:.3f}",
    )


def parts_of(text: str) -> tuple[str, str, str]:
    """White space before, what is drawn, white space after. A token of white space alone is drawn by a sign for it."""
    body = text.strip()
    if body:
        lead, _, tail = text.partition(body)
        return lead, body, tail
    if "\n" in text:
        return "", "⏎" * text.count("\n"), "\n" * text.count("\n")
    return "", ("␣" * len(text)) or PART_OF_CHARACTER, ""


def probability(logp: float) -> str:
    """Two figures that tell 0.999 from 1 and 1e-7 from 0."""
    p = math.exp(logp)
    if p >= 0.001 or p == 0:
        return f"{p:.3f}"
    return f"{p:.0e}".replace("e-0", "e-")


def signed(value: float) -> str:
    """With its sign (a true minus), three decimals; a value that rounds to 0 has none."""
    text = f"{value:+.3f}"
    return "0.000" if float(text) == 0 else text.replace("-", "−")


def embedded(picture: Image.Image) -> tuple[str, bool]:
    """A data URI for a page (large pictures scaled down), and whether it is small: to be enlarged with hard edges."""
    small = max(picture.size) <= _PIXELATED_SIDE
    shown = picture.copy()
    shown.thumbnail((_EMBEDDED_SIDE, _EMBEDDED_SIDE))
    kind = "PNG" if small else "JPEG"
    with io.BytesIO() as file:
        shown.convert("RGB").save(file, format=kind, **({} if small else {"quality": 88}))
        return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}", small
