"""From right and wrong rows to a benchmark's number: lmms-eval's sums and ours, on answers that both read alike."""

from __future__ import annotations

import contextlib
import io
import random
from collections.abc import Callable, Mapping
from typing import Any

from parity.answers import Record, records

_ROLLS = 4


def _plain(benchmark: str, count: int, seed: int) -> list[Record]:
    """Bare letters (yes, no), half of them right."""
    rng = random.Random(f"totals:{seed}")
    rows = records(benchmark, count=count, seed=seed)
    for row in rows:
        right = row["answer"].strip("()").capitalize()
        others = [x for x in row.get("choices", ("Yes", "No")) if x != right]
        row["prediction"] = right if rng.random() < 0.7 else rng.choice(others)
    return rows


def mmbench_rows(seed: int) -> list[Record]:
    rows = []
    for row in _plain("mmbench", 200, seed):
        names = list(row["choices"])
        for roll in range(min(_ROLLS, len(names))):
            turned = {name: row["choices"][names[(place + roll) % len(names)]] for place, name in enumerate(names)}
            answer = names[(names.index(row["answer"]) - roll) % len(names)]
            right = random.Random(f"{seed}:{row['index']}:{roll}").random() < 0.8
            said = answer if right else names[(names.index(answer) + 1) % len(names)]
            index = row["index"] + 1_000_000 * roll
            rows.append(
                row | {"id": str(index), "index": index, "choices": turned, "answer": answer, "prediction": said}
            )
    return rows


def mmbench(rows: list[Record]) -> dict[str, float]:
    from lmms_eval.tasks.mmbench.mmbench_evals import MMBench_Evaluator

    table = [
        {key: row[key] for key in ("index", "prediction", "answer", "category")}
        | {"question": "?", "l2-category": row["l2_category"]}
        | {letter: row["choices"].get(letter, float("nan")) for letter in "ABCDE"}
        for row in rows
    ]
    return {"overall": 100 * float(MMBench_Evaluator().eval_result(table, "static")[0])}


def cvbench(rows: list[Record]) -> dict[str, float]:
    from lmms_eval.tasks.cv_bench import utils

    results = [
        utils.cv_bench_process_results(row | {"idx": row["id"]}, [row["prediction"]])["cv_bench_acc"] for row in rows
    ]
    return {
        "row_accuracy": 100 * float(utils.cv_bench_aggregate_results(results)),
        "overall": 100 * float(utils.cv_bench_default_aggregate_results(results)),
    }


def mmvp(rows: list[Record]) -> dict[str, float]:
    from lmms_eval.tasks.mmvp import utils

    docs = [{"Index": row["index"], "Correct Answer": row["answer"]} for row in rows]
    results = [
        utils.mmvp_process_results(doc, [row["prediction"]])["mmvp_accuracy"]
        for doc, row in zip(docs, rows, strict=True)
    ]
    return {
        "row_accuracy": 100 * float(utils.mmvp_aggregate_results(results)),
        "pair_accuracy": 100 * float(utils.mmvp_aggregate_pair_results(results)),
    }


def naturalbench(rows: list[Record]) -> dict[str, float]:
    from lmms_eval.tasks.naturalbench import utils

    results: dict[str, list[Any]] = {}
    for row in rows:
        doc = {"Question_Type": row["question_type"], "Index": row["index"]}
        for name, value in utils.naturalbench_process_results(doc, [row["prediction"]]).items():
            results.setdefault(name, []).append(value)
    aggregates = {
        "Acc": utils.naturalbench_aggregate_results_ACC(results["naturalbench_Acc"]),
        "Q-Acc": utils.naturalbench_aggregate_results_Q_ACC(results["naturalbench_Q_ACC"]),
        "I-Acc": utils.naturalbench_aggregate_results_I_ACC(results["naturalbench_I_ACC"]),
        "G-Acc": utils.naturalbench_aggregate_results_G_ACC(results["naturalbench_G_ACC"]),
    }
    return {name: 100 * float(value) for name, value in aggregates.items()}


TOTALS: Mapping[str, tuple[Callable[[int], list[Record]], Callable[[list[Record]], dict[str, float]]]] = {
    "mmbench": (mmbench_rows, mmbench),
    "cvbench": (lambda seed: _plain("cvbench", 300, seed), cvbench),
    "mmvp": (lambda seed: _plain("mmvp", 300, seed), mmvp),
    "naturalbench": (lambda seed: _plain("naturalbench", 7600, seed), naturalbench),
}
"""Benchmark -> its rows for a seed, and lmms-eval's numbers under our names, 0 to 100."""


def lmms_totals(benchmark: str, rows: list[Record]) -> dict[str, float]:
    """lmms-eval's numbers; it prints as it sums."""
    with contextlib.redirect_stdout(io.StringIO()):
        return TOTALS[benchmark][1](rows)
