"""lmms-eval's verdict on a score record: its own functions, called on a row as its own data would have it."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from parity.answers import Record


def _ai2d(rows: Sequence[Record]) -> list[float]:
    from lmms_eval.api.metrics import exact_match_hf_evaluate
    from lmms_eval.tasks.ai2d.utils import MultiChoiceRegexFilter, ai2d_doc_to_target

    # as in ai2d.yaml
    chain = MultiChoiceRegexFilter(
        group_select=0, ignore_case=True, ignore_punctuation=True, regex_pattern=r"([A-Z])\."
    )
    docs = [
        {"options": list(row["choices"].values()), "answer": list(row["choices"]).index(row["answer"])} for row in rows
    ]
    filtered = chain.apply([[row["prediction"].strip()] for row in rows], docs)
    return [
        float(
            exact_match_hf_evaluate(
                predictions=[answer.strip()],
                references=[ai2d_doc_to_target(doc, "mcq")],
                ignore_case=True,
                ignore_punctuation=True,
            )["exact_match"]
        )
        for answer, doc in zip(filtered, docs, strict=True)
    ]


def _docvqa(rows: Sequence[Record]) -> list[float]:
    from lmms_eval.api.metrics import anls

    return [float(anls(references=row["answer"], predictions=[row["prediction"].strip()])["anls"]) for row in rows]


def _ocrbench(rows: Sequence[Record]) -> list[float]:
    from lmms_eval.tasks.ocrbench.utils import ocrbench_process_results

    def doc(row: Record) -> dict[str, Any]:
        maths = row["question_type"] == "Handwritten Mathematical Expression Recognition"
        return {
            "answer": row["answer"],
            "dataset": "HME100k" if maths else "drawn",
            "question_type": row["question_type"],
        }

    return [
        float(ocrbench_process_results(doc(row), [row["prediction"]])["ocrbench_accuracy"]["score"]) for row in rows
    ]


def _cvbench(rows: Sequence[Record]) -> list[float]:
    from lmms_eval.tasks.cv_bench.utils import cv_bench_process_results

    verdicts = []
    for row in rows:
        doc = {
            "idx": row["id"],
            "type": row["type"],
            "task": row["task"],
            "source": row["source"],
            "answer": row["answer"],
        }
        verdicts.append(float(cv_bench_process_results(doc, [row["prediction"]])["cv_bench_acc"]["is_correct"]))
    return verdicts


def _mmvp(rows: Sequence[Record]) -> list[float]:
    from lmms_eval.tasks.mmvp.utils import mmvp_process_results

    verdicts = []
    for row in rows:
        doc = {"Index": row["index"], "Correct Answer": row["answer"]}
        verdicts.append(float(mmvp_process_results(doc, [row["prediction"]])["mmvp_accuracy"]["is_correct"]))
    return verdicts


def _naturalbench(rows: Sequence[Record]) -> list[float]:
    from lmms_eval.tasks.naturalbench.utils import naturalbench_process_results

    verdicts = []
    for row in rows:
        doc = {"Question_Type": row["question_type"], "Index": row["index"]}
        said = naturalbench_process_results(doc, [row["prediction"]])["naturalbench_Acc"]["score"]
        verdicts.append(float(said == (1 if row["answer"] in ("Yes", "A") else 0)))
    return verdicts


def _mmbench(rows: Sequence[Record]) -> list[float]:
    import pandas as pd
    from lmms_eval.tasks.mmbench.mmbench_evals import MMBench_Evaluator

    judge = MMBench_Evaluator()
    verdicts = []
    for row in rows:
        options = {letter: row["choices"].get(letter, float("nan")) for letter in "ABCDE"}
        table = pd.DataFrame([{"index": row["index"], "prediction": row["prediction"].strip(), **options}])
        verdicts.append(float(judge.eval_sub_data(table, {row["index"]: row["answer"]}, static_only=True)))
    return verdicts


_VERDICTS: Mapping[str, Callable[[Sequence[Record]], list[float]]] = {
    "mmbench": _mmbench,
    "ai2d": _ai2d,
    "docvqa": _docvqa,
    "ocrbench": _ocrbench,
    "cvbench": _cvbench,
    "mmvp": _mmvp,
    "naturalbench": _naturalbench,
}


def verdicts(benchmark: str, rows: Sequence[Record]) -> list[float]:
    """0 to 1 for each row. lmms-eval prints what it finds no answer in; that is dropped."""
    with contextlib.redirect_stdout(io.StringIO()):
        return _VERDICTS[benchmark](rows)


def version() -> str:
    from importlib.metadata import version as version_of

    return version_of("lmms-eval")
