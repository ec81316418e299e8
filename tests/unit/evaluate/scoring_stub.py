"""Stands in for dpa.evaluate.scoring until it joins: the door's types, and exact match of letters or texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class ScoringRules:
    profile: str = "paper"
    vlmevalkit: str = "2025-05"


@dataclass(frozen=True, slots=True)
class ScoredRecord:
    id: str
    group: str
    kind: str
    score: float
    parsed: bool
    empty: bool


@dataclass(frozen=True, slots=True)
class Unit:
    id: str
    group: str
    score: float
    weight: float


@dataclass(frozen=True, slots=True)
class BenchmarkScore:
    benchmark: str
    rules: ScoringRules
    n: int
    metrics: dict[str, float]
    headline: str
    records: tuple[ScoredRecord, ...]
    units: tuple[Unit, ...]
    unparsed_share: float
    empty_share: float

    def to_dict(self, *, per_sample: bool) -> dict[str, Any]:
        assert not per_sample
        return {
            "benchmark": self.benchmark,
            "profile": self.rules.profile,
            "vlmevalkit": self.rules.vlmevalkit,
            "judge": "none",
            "n": self.n,
            "headline": self.headline,
            "metrics": self.metrics,
            "unparsed_share": self.unparsed_share,
            "empty_share": self.empty_share,
        }


def _group(benchmark: str, record: Mapping[str, Any]) -> str:
    if benchmark == "mmbench":
        return str(record["index"] % 1_000_000)
    return str((record["index"] - 1) // 2) if benchmark == "mmvp" else str(record["id"])


def score(
    benchmark: str,
    records: Sequence[Mapping[str, Any]],
    rules: ScoringRules = ScoringRules(),
    *,
    complete: bool = True,
) -> BenchmarkScore:
    del complete
    scored, units = [], {}
    weights = {"ADE20K": 1 / 4, "COCO": 1 / 4, "Omni3D": 1 / 2}
    for record in records:
        answers = [record["answer"]] if isinstance(record["answer"], str) else record["answer"]
        right = float(record["prediction"] in answers)
        kind = record.get("source") or record.get("question_type") or record.get("category") or benchmark
        group = _group(benchmark, record)
        scored.append(ScoredRecord(str(record["id"]), group, kind, right, right > 0, not record["prediction"]))
        weight = 1.0
        if benchmark == "cvbench":
            weight = weights[record["source"]] / sum(other["source"] == record["source"] for other in records)
        before = units[group].score if group in units else 1.0
        units[group] = Unit(group, group, min(before, right), weight)
    found = tuple(units.values())
    headline = 100 * sum(u.score * u.weight for u in found) / sum(u.weight for u in found)
    return BenchmarkScore(
        benchmark=benchmark,
        rules=rules,
        n=len(records),
        metrics={"accuracy": headline},
        headline="accuracy",
        records=tuple(scored),
        units=found,
        unparsed_share=sum(not item.parsed for item in scored) / len(scored),
        empty_share=sum(item.empty for item in scored) / len(scored),
    )
