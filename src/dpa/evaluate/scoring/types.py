"""What scoring takes and gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from dpa.errors import UserError

Profile = Literal["paper", "strict"]
VlmEvalKit = Literal["2025-05", "2026-08"]


@dataclass(frozen=True, slots=True)
class ScoringRules:
    """How an answer is read. No profile asks a judge (another model).

    Raises:
        UserError: an unknown profile or version.
    """

    profile: Profile = "paper"
    """``paper``: as the toolkits' code does it. ``strict``: the whole answer is the letter or the option's text."""
    vlmevalkit: VlmEvalKit = "2025-05"
    """State of VLMEvalKit whose letter rules hold for mmbench and ai2d in ``paper``; the paper's is 2025-05."""

    def __post_init__(self) -> None:
        for name, value, known in (
            ("profile", self.profile, get_args(Profile)),
            ("vlmevalkit", self.vlmevalkit, get_args(VlmEvalKit)),
        ):
            if value not in known:
                raise UserError(f"{name} is {value!r}; choose {' or '.join(known)}")


@dataclass(frozen=True, slots=True)
class ScoredRecord:
    """One answer."""

    id: str
    group: str
    """Answers of a group are not independent: question, pair, quadruple, document, scene."""
    kind: str
    """A row of the table: category, question type, source; ``all`` where the benchmark has none."""
    score: float
    """0 to 1, of this answer by itself."""
    parsed: bool
    """An option (yes, no) was found in the answer; where there are no options, the answer has text."""
    empty: bool
    """The answer has no text."""


@dataclass(frozen=True, slots=True)
class Unit:
    """What counts as one for the headline: headline = 100 * sum(weight * score) / sum(weight)."""

    id: str
    group: str
    """The bootstrap draws groups."""
    score: float
    """0 to 1."""
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a benchmark's scorer returns."""

    metrics: dict[str, float]
    headline: str
    records: tuple[ScoredRecord, ...]
    units: tuple[Unit, ...]


@dataclass(frozen=True, slots=True)
class BenchmarkScore:
    """One benchmark under one set of rules."""

    benchmark: str
    rules: ScoringRules
    n: int
    """Records (rows), not units."""
    metrics: dict[str, float]
    """Standard names, on 0 to 100, the headline first; counts are ``hits`` (OCRBench), ``rolls_per_question``."""
    headline: str
    """The key of ``metrics`` that enters the paper's average."""
    records: tuple[ScoredRecord, ...]
    """In the order given."""
    units: tuple[Unit, ...]
    unparsed_share: float
    """Share of records that have text in which no option was found, 0 to 1."""
    empty_share: float
    """Share of records without text, 0 to 1."""

    def to_dict(self, *, per_sample: bool) -> dict[str, Any]:
        """For JSON; ``per_sample`` adds id -> score, 0 to 1."""
        result: dict[str, Any] = {
            "benchmark": self.benchmark,
            "profile": self.rules.profile,
            "vlmevalkit": self.rules.vlmevalkit,
            "judge": "none",
            "n": self.n,
            "metrics": self.metrics,
            "headline": self.headline,
            "unparsed_share": self.unparsed_share,
            "empty_share": self.empty_share,
        }
        if per_sample:
            result["per_sample"] = {record.id: record.score for record in self.records}
        return result

    def text(self) -> str:
        """For people."""
        version = f", VLMEvalKit {self.rules.vlmevalkit}" if self.rules.profile == "paper" else ""
        width = max(map(len, (*self.metrics, "unparsed")))
        marks = {self.headline: "  <- the benchmark's number"}
        rows = [f"{name:<{width}}  {value:7.2f}{marks.get(name, '')}" for name, value in self.metrics.items()]
        return "\n".join(
            [
                f"{self.benchmark}: {self.n} answers, {len(self.units)} units (profile {self.rules.profile}{version}, "
                "judge none)",
                *rows,
                f"{'unparsed':<{width}}  {100 * self.unparsed_share:7.2f} %",
                f"{'empty':<{width}}  {100 * self.empty_share:7.2f} %",
            ]
        )
