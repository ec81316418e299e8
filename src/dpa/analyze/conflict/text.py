"""What ``dpa conflict`` says in a terminal."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dpa.analyze.conflict.intervals import Estimate
from dpa.analyze.conflict.phrases import Phrase
from dpa.analyze.conflict.result import ClassConflict, Conflict

_WIDTH = 110
_PHRASES, _OPENINGS = 10, 5
"""Shown here; the report and ``--json`` have them all."""


def conflict_text(conflict: Conflict) -> str:
    """Scores, classes, phrases, verdict."""
    verdict = conflict.verdict
    parts = [
        "\n".join(textwrap.fill(line, _WIDTH, subsequent_indent="  ") for line in facts_of(conflict)),
        _scores(conflict),
        _classes(conflict),
        _phrases(
            f"phrases with the largest gap (nats per occurrence, in {conflict.min_phrase_count} captions or more)",
            conflict.phrases[:_PHRASES],
        ),
        _phrases(
            f"openings that repeat (the three commonest begin {conflict.opening_share:.0%} of the captions)",
            conflict.openings[:_OPENINGS],
        ),
        "\n".join(
            _wrapped(line)
            for line in (
                f"verdict: {verdict.level}. {verdict.headline} {verdict.advice}",
                *verdict.warnings,
                verdict.basis,
                *verdict.limits,
            )
        ),
    ]
    return "\n\n".join(part for part in parts if part)


def facts_of(conflict: Conflict) -> list[str]:
    """Lines that say what was measured, and how the proxy was made."""
    left_out = "".join(f"; {count:,} x {reason}" for reason, count in conflict.left_out.items())
    lines = [
        f"{conflict.source}: {conflict.captions:,} of {conflict.records:,} records, {conflict.tokens:,} tokens of "
        f"{conflict.llm}; measured on {conflict.held_out:,} held-out captions{left_out}",
        f"{conflict.device}, {conflict.dtype}, seed {conflict.seed}, {conflict.seconds:.0f} s",
    ]
    if conflict.cut:
        lines.append(f"{conflict.cut:,} tokens beyond the longest length were not read (--max-length)")
    made = conflict.adaptation
    if made is None:
        lines.insert(1, f"proxy: {conflict.proxy}")
    else:
        lines.insert(
            1,
            f"proxy: LoRA of rank {made.rank}, {made.steps} steps at {made.learning_rate:g}, {made.captions:,} other "
            f"captions, {made.tokens:,} tokens read",
        )
    return lines


def scores_of(conflict: Conflict) -> list[tuple[str, Estimate, str]]:
    """Name, figure, unit."""
    rows = [
        ("surprise, whole sample", conflict.prior, "nats per token"),
        ("surprise, held out", conflict.prior_held_out, "nats per token"),
        ("  after adaptation", conflict.proxy_held_out, "nats per token"),
        ("conflict score", conflict.gap, "nats per token"),
        ("", conflict.gap_per_caption, "nats per caption"),
        ("", conflict.share, "of the surprise"),
    ]
    if conflict.gap_adapted is not None:
        rows.append(("  on captions it read", conflict.gap_adapted, "nats per token"))
    return rows


def figure(estimate: Estimate, unit: str = "") -> tuple[str, str]:
    """Value and interval as text."""
    if unit == "of the surprise":
        return f"{estimate.value:.1%}", f"[{estimate.low:.1%}, {estimate.high:.1%}]"
    digits = 1 if abs(estimate.value) >= 10 else 3
    return f"{_no_minus(estimate.value, digits):.{digits}f}", f"[{estimate.low:.{digits}f}, {estimate.high:.{digits}f}]"


def _no_minus(value: float, digits: int) -> float:
    """Rounded, and 0 without a sign."""
    return round(value, digits) + 0.0


def _scores(conflict: Conflict) -> str:
    table = _table("", "", "95 %", "")
    for name, estimate, unit in scores_of(conflict):
        table.add_row(name, *figure(estimate, unit), unit)
    return _plain(table)


def _classes(conflict: Conflict) -> str:
    table = _table("class of words", "tokens", "surprise", "gap", "95 %", "of all nats explained")
    for group in (conflict.truth, conflict.classes):
        for item in group:
            table.add_row(*class_row(item))
        if group and group is conflict.truth:
            table.add_section()
    return _plain(table)


def class_row(item: ClassConflict) -> list[str]:
    """Name, share of tokens, surprise, gap, its interval, share of the gap."""
    return [
        item.name,
        f"{item.share_of_tokens:.0%}",
        figure(item.prior)[0],
        *figure(item.gap),
        "" if item.share_of_gap is None else f"{_no_minus(item.share_of_gap, 2):.0%}",
    ]


def _phrases(title: str, phrases: Sequence[Phrase]) -> str:
    if not phrases:
        return ""
    table = _table("captions", "gap", "surprise", "words", justify=3)
    for phrase in phrases:
        table.add_row(str(phrase.captions), f"{phrase.gap:.2f}", f"{phrase.prior:.2f}", Text(phrase.text))
    return f"{title}\n{_plain(table)}"


def _table(*columns: str, justify: int = 1) -> Table:
    """Figures to the right, but for the first column (or the one at ``justify``) and units."""
    table = Table(box=None, pad_edge=False)
    for place, name in enumerate(columns):
        words = place == 0 if justify == 1 else place == justify
        table.add_column(name, justify="left" if words or (not name and place) else "right")
    return table


def _wrapped(line: str) -> str:
    return textwrap.fill(line, _WIDTH, initial_indent="- ", subsequent_indent="  ")


def _plain(table: Table) -> str:
    console = Console(file=io.StringIO(), width=_WIDTH, color_system=None)
    with console.capture() as captured:
        console.print(table)
    return "\n".join(line.rstrip() for line in captured.get().strip("\n").split("\n"))
