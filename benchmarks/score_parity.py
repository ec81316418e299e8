#!/usr/bin/env python3
"""The same made-up answers to lmms-eval's scorers and to ours: agreement, and every difference explained.

    python benchmarks/score_parity.py                            # needs the extra: pip install lmms-eval==0.7.3
    python benchmarks/score_parity.py --count 2000 --json
    python benchmarks/score_parity.py --vlmevalkit ~/VLMEvalKit --vlmevalkit-rules 2025-05 --cambrian ~/cambrian

With a clone of VLMEvalKit (checked out at the state that the rules name) or of Cambrian, their own functions judge the
same answers, too; there every disagreement is a fault. Exit code 1 where a difference is unexplained.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchkit.machine import format_table
from parity.answers import GENERATORS, Record, records
from parity.differences import Case, classify
from parity.lmms import verdicts, version
from parity.toolkits import TOOLKITS
from parity.totals import TOTALS, lmms_totals

from dpa.evaluate.scoring import BenchmarkScore, ScoringRules, score

_SAME = 1e-9
"""Scores are quotients of small integers; both sides compute them in float64."""


def disagreements(ours: BenchmarkScore, rows: Sequence[Record], theirs: Sequence[float]) -> list[Case]:
    """Rows to which the two give different scores."""
    return [
        Case(row=row, ours=own.score, theirs=their, parsed=own.parsed)
        for own, row, their in zip(ours.records, rows, theirs, strict=True)
        if abs(own.score - their) > _SAME
    ]


def against_lmms(benchmark: str, count: int, seed: int) -> dict[str, Any]:
    """Row by row."""
    rows = records(benchmark, count=count, seed=seed)
    ours = score(benchmark, rows, ScoringRules(), complete=False)
    cases = disagreements(ours, rows, verdicts(benchmark, rows))
    classes, unexplained = classify(benchmark, cases)
    return {
        "benchmark": benchmark,
        "n": len(rows),
        "agreement": 1 - len(cases) / len(rows),
        "classes": {name: _told(members) for name, members in classes.items()},
        "unexplained": _told(unexplained),
    }


def _told(cases: Sequence[Case]) -> dict[str, Any]:
    """Count, and the shortest answers as examples."""
    answers = dict.fromkeys(case.row["prediction"] for case in cases)
    return {"n": len(cases), "examples": sorted(answers, key=len)[:4]}


def totals(benchmark: str, seed: int) -> dict[str, Any]:
    """The benchmark's numbers from the same verdicts."""
    make, _ = TOTALS[benchmark]
    rows = make(seed)
    ours = score(benchmark, rows, ScoringRules(), complete=False).metrics
    theirs = lmms_totals(benchmark, rows)
    return {"benchmark": benchmark, "n": len(rows), "numbers": {key: [ours[key], theirs[key]] for key in theirs}}


def against_toolkit(toolkit: str, clone: Path, rules: ScoringRules, count: int, seed: int) -> list[dict[str, Any]]:
    """Row by row, for the benchmarks that the toolkit decides."""
    results = []
    for benchmark in GENERATORS:
        rows = records(benchmark, count=count, seed=seed)
        theirs = TOOLKITS[toolkit](clone, benchmark, rows)
        if theirs is None:
            continue
        cases = disagreements(score(benchmark, rows, rules, complete=False), rows, theirs)
        name = f"{toolkit} {rules.vlmevalkit}" if toolkit == "vlmevalkit" else toolkit
        results.append(
            {
                "toolkit": name,
                "benchmark": benchmark,
                "n": len(rows),
                "agreement": 1 - len(cases) / len(rows),
                "unexplained": _told(cases),
            }
        )
    return results


def failed(result: Mapping[str, Any]) -> bool:
    """Something is unexplained."""
    rows = [*result["rows"], *result["toolkits"]]
    sums = [pair for item in result["totals"] for pair in item["numbers"].values()]
    return any(row["unexplained"]["n"] for row in rows) or any(abs(a - b) > 1e-6 for a, b in sums)


def _text(result: Mapping[str, Any]) -> str:
    rows = [
        [row["benchmark"], str(row["n"]), f"{100 * row['agreement']:.1f} %", str(row["unexplained"]["n"])]
        for row in result["rows"]
    ]
    lines = [
        f"answers, lmms-eval {result['lmms_eval']}",
        format_table(["benchmark", "n", "agree", "unexplained"], rows),
    ]
    for row in result["rows"]:
        for name, told in [*row["classes"].items(), ("UNEXPLAINED", row["unexplained"])]:
            if told["n"]:
                lines.append(f"{row['benchmark']}: {told['n']}: {name}\n    {told['examples']}")
    sums = [
        [item["benchmark"], str(item["n"]), name, f"{ours:.4f}", f"{theirs:.4f}"]
        for item in result["totals"]
        for name, (ours, theirs) in item["numbers"].items()
    ]
    lines += ["", format_table(["benchmark", "n", "number", "ours", "lmms-eval"], sums)]
    if result["toolkits"]:
        rows = [
            [
                row["toolkit"],
                row["benchmark"],
                str(row["n"]),
                f"{100 * row['agreement']:.2f} %",
                str(row["unexplained"]),
            ]
            for row in result["toolkits"]
        ]
        lines += ["", format_table(["toolkit", "benchmark", "n", "agree", "disagreements"], rows)]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """0, or 1 where a difference is unexplained."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=600, help="answers per benchmark")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vlmevalkit", type=Path, help="a clone of VLMEvalKit")
    parser.add_argument("--vlmevalkit-rules", choices=["2025-05", "2026-08"], default="2025-05")
    parser.add_argument("--cambrian", type=Path, help="a clone of Cambrian")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    rules = ScoringRules(vlmevalkit=options.vlmevalkit_rules)
    clones = {"vlmevalkit": options.vlmevalkit, "cambrian": options.cambrian}
    result: dict[str, Any] = {
        "lmms_eval": version(),
        "seed": options.seed,
        "rows": [against_lmms(name, options.count, options.seed) for name in GENERATORS],
        "totals": [totals(name, options.seed) for name in TOTALS],
        "toolkits": [
            row
            for name, clone in clones.items()
            if clone is not None
            for row in against_toolkit(name, clone, rules, options.count, options.seed)
        ],
    }
    print(json.dumps(result, indent=2, ensure_ascii=False) if options.json else _text(result))
    return int(failed(result))


if __name__ == "__main__":
    sys.exit(main())
