"""What a score means for the choice of method, in words, with what that rests on.

Thresholds come from the lab, where the conflict is known: ``levels.json`` holds the score at five shares of captions in
language B and is written by ``scripts/conflict_levels.py``. A new LLM of the lab means one run of that script.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Final, Literal

from dpa.analyze.conflict.intervals import Estimate

Level = Literal["low", "medium", "high"]

PAPER_CAPTIONS: Final = 558_000
"""The smallest caption set of the paper (BLIP-LCS)."""
_GENERALISES = 0.5
"""Below this share of the gap on read captions, the proxy has learned them rather than their language."""
_LEVELS: Final = "levels.json"


@dataclass(frozen=True, slots=True)
class Thresholds:
    """Shares of the prior NLL."""

    medium: float
    """The middle between the lab's pure A and 25 % B."""
    high: float
    """The middle between the lab's 25 % and 100 % B."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """A level and its reasons."""

    level: Level
    headline: str
    advice: str
    basis: str
    warnings: tuple[str, ...]
    """What speaks against relying on it in this very case."""
    limits: tuple[str, ...]
    """What it cannot know in any case."""


@cache
def lab_levels() -> dict[str, Any]:
    """What ``scripts/conflict_levels.py`` wrote: command, machine, and the score at each level."""
    content: dict[str, Any] = json.loads((files(__package__) / _LEVELS).read_text(encoding="utf-8"))
    return content


def thresholds_of(levels: list[dict[str, Any]]) -> Thresholds:
    """From the measured levels (``percent_b``, ``share``)."""
    share = {row["percent_b"]: float(row["share"]["value"]) for row in levels}
    return Thresholds(medium=(share[0] + share[25]) / 2, high=(share[25] + share[100]) / 2)


def level_of(share: float, thresholds: Thresholds) -> Level:
    """Low, medium or high."""
    if share >= thresholds.high:
        return "high"
    return "medium" if share >= thresholds.medium else "low"


_HEADLINES: dict[Level, str] = {
    "low": "The captions speak much as the LLM does.",
    "medium": "The captions have a language of their own, to a degree.",
    "high": "The captions' language is far from the LLM's.",
}
_ADVICE: dict[Level, str] = {
    "low": "A proxy has little style to remove. What token weights are worth is not decided by this figure: in the lab "
    "dpa beat vanilla on such captions all the same. Run both (methods: [dpa, vanilla]) and compare.",
    "medium": "A proxy has something to remove: run pmo, dpa-prior and vanilla on the same data (methods: [dpa-prior, "
    "pmo, vanilla]; stages that are equal are shared) and compare.",
    "high": "This is the case that a proxy is made for: dpa-prior, or pmo without token weights. dpa's own weights "
    "lost to vanilla in the lab where visual words stand alone among such a style (dpa explain shows whether they do). "
    "Run vanilla beside it (methods: [dpa-prior, vanilla]) before you trust it.",
}
_LIMITS = (
    "It is a measurement of language, not of accuracy: no picture was looked at and nothing was trained to see.",
    "The gap holds everything that text alone can teach: style, but also which things and facts are common in these "
    "captions.",
    "The proxy was adapted briefly; a longer stage 1 finds a larger gap. Compare scores of equal settings only.",
    "The intervals are over captions; another seed of the proxy moves the score a little, too.",
)


def judge(share: Estimate, gap: Estimate, gap_adapted: Estimate | None, *, records: int, steps: int | None) -> Verdict:
    """The verdict.

    Args:
        share: of the prior NLL, the figure that decides.
        gap, gap_adapted: nats per token on held-out and on read captions.
        records: of the source.
        steps: of the proxy; None: it was given.
    """
    measured = lab_levels()
    limits = thresholds_of(measured["levels"])
    level = level_of(share.value, limits)
    reached = list(dict.fromkeys(level_of(bound, limits) for bound in (share.low, share.high)))
    if len(reached) > 1 and gap.high > 0:
        between = f" The interval reaches from {reached[0]} to {reached[1]}: a larger --sample would narrow it."
    else:
        between = ""
    basis = (
        f"Adaptation explains {share.value:.1%} of the LLM's surprise [{share.low:.1%}, {share.high:.1%}]. In the lab, "
        f"where the share of foreign captions is known, medium begins at {limits.medium:.1%} (the middle between 0 and "
        f"25 % foreign captions) and high at {limits.high:.1%} (the middle between 25 and 100 %), measured with "
        f"{measured['llm']}. Real data and larger LLMs may lie elsewhere on this scale: trust the order of data sets "
        f"under one LLM more than the word.{between}"
    )
    return Verdict(
        level=level,
        headline=_HEADLINES[level],
        advice=_ADVICE[level],
        basis=basis,
        warnings=tuple(_warnings(gap, gap_adapted, records, steps, measured["steps"])),
        limits=_LIMITS,
    )


def _warnings(
    gap: Estimate, gap_adapted: Estimate | None, records: int, steps: int | None, lab_steps: int
) -> list[str]:
    found = []
    if gap.low <= 0:
        found.append("The gap is not distinguishable from 0.")
    if gap_adapted is not None and gap_adapted.value > 0 and gap.value < _GENERALISES * gap_adapted.value:
        found.append(
            f"The proxy overfits: it gained {gap_adapted.value:.3f} nats per token on captions that it read and "
            f"{gap.value:.3f} on others. With so little text a stage 1 learns captions instead of their language: "
            "sample more, or adapt for fewer steps."
        )
    if steps is None:
        found.append(
            "The given proxy may have read these very captions in training, and longer than the lab's: the gap is then "
            "too large for the lab's scale."
        )
    elif steps < lab_steps:
        found.append(
            f"The proxy had {steps} steps, the lab's scale rests on {lab_steps}: the score is too low for it, and "
            "the level at least this one. Take a larger --sample."
        )
    elif steps > lab_steps:
        found.append(
            f"The proxy had {steps} steps, the lab's scale rests on {lab_steps}: the score is too high for that scale."
        )
    if records < PAPER_CAPTIONS:
        found.append(
            f"Little data: {records:,} captions, the paper's smallest set has {PAPER_CAPTIONS:,}. Its authors warn "
            "that dpa can lose against vanilla when captions are few, however large the conflict."
        )
    return found
