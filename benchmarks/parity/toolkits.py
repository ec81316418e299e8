"""Verdicts of VLMEvalKit's and Cambrian's own code, from a clone that the user names; nothing of it is copied here.

Neither can be installed beside us (old pins, judges, hundreds of data sets), but the functions that decide stand in
files that load alone, with the logger of VLMEvalKit replaced by the standard one.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import logging
import os
import re
import string
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from parity.answers import Record

_OPTION_BENCHMARKS = ("mmbench", "ai2d")
_CAMBRIAN_FILES = {"ADE20K": "ade", "COCO": "coco", "Omni3D": "omni"}


def vlmevalkit(clone: Path, benchmark: str, rows: Sequence[Record]) -> list[float] | None:
    """One of MMBench, AI2D (without a judge), DocVQA, NaturalBench; None for another benchmark."""
    if benchmark in _OPTION_BENCHMARKS:
        infer = _vlmevalkit_module(clone, "vlmeval/utils/matching_util.py", "vlmeval.utils.matching_util").can_infer
        return [float(infer(row["prediction"], dict(row["choices"])) == row["answer"]) for row in rows]
    if benchmark == "docvqa":
        module = _vlmevalkit_module(clone, "vlmeval/dataset/utils/vqa_eval.py", "vlmeval.dataset.utils.vqa_eval")
        verdicts = []
        for row in rows:  # hit_calculate and process_line, method "anls": the best over the answers, below 0.5 nothing
            best = 1 - min(module.anls_compute(answer, row["prediction"]) for answer in row["answer"])
            verdicts.append(0.0 if best < 0.5 else float(best))
        return verdicts
    if benchmark == "naturalbench":
        path = "vlmeval/dataset/utils/naturalbench.py"
        extract = _vlmevalkit_module(clone, path, "vlmeval.dataset.utils.naturalbench").extract_answer
        with contextlib.redirect_stdout(io.StringIO()):
            said = [extract(row["prediction"], task_type=row["question_type"]) for row in rows]
        return [float(item == int(row["answer"] in ("Yes", "A"))) for item, row in zip(said, rows, strict=True)]
    return None


def cambrian(clone: Path, benchmark: str, rows: Sequence[Record]) -> list[float] | None:
    """MMVP (each row, not pairs) or CV-Bench; None for another benchmark."""
    if benchmark == "mmvp":
        module = _module(clone / "eval/eval/mmvp/mmvp_test.py", "mmvp_test")
        return [_mmvp_row(module, row) for row in rows]
    if benchmark == "cvbench":
        verdicts: dict[str, float] = {}
        for source, name in _CAMBRIAN_FILES.items():
            module = _module(clone / f"eval/eval/{name}/{name}_test.py", f"{name}_test")
            verdicts |= _cambrian_rows(module, [row for row in rows if row["source"] == source])
        return [verdicts[row["id"]] for row in rows]
    return None


def _mmvp_row(module: ModuleType, row: Record) -> float:
    """Its loop counts pairs; a file of one line is a file of one first row, which counts where it is right."""
    return _cambrian_rows(module, [row])[row["id"]]


def _cambrian_rows(module: ModuleType, rows: Sequence[Record]) -> dict[str, float]:
    """Runs ``compute_metrics`` on a file of answers; what it writes down as incorrect is."""
    with tempfile.TemporaryDirectory() as folder:
        answers, wrong, table = (str(Path(folder, name)) for name in ("answers.jsonl", "wrong.jsonl", "all.csv"))
        Path(answers).write_text("".join(json.dumps(_cambrian_line(row)) + "\n" for row in rows), encoding="utf-8")
        with contextlib.redirect_stdout(io.StringIO()):
            module.compute_metrics(answers, wrong, table)
        ids = {json.loads(line)["question_id"] for line in Path(wrong).read_text(encoding="utf-8").splitlines()}
    return {row["id"]: float(row["id"] not in ids) for row in rows}


def _cambrian_line(row: Record) -> dict[str, Any]:
    options = list(row["choices"].values())
    right = f"({row['answer'].strip('()').lower()})"
    return {
        "question_id": row["id"],
        "answer": row["prediction"],
        "gt_answer": right,
        "model_id": "parity",
        "text_options": options,
        "options": options,
        "category": "drawn",
    }


def _module(path: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None, f"{path} is no Python file"
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _vlmevalkit_module(clone: Path, path: str, name: str) -> ModuleType:
    """``vlmeval.smp`` gives its importers a logger and standard modules; a stand-in with those takes its place."""
    smp = ModuleType("vlmeval.smp")
    standard: Mapping[str, Any] = {"os": os, "re": re, "string": string, "logging": logging}
    vars(smp).update(standard, get_logger=logging.getLogger, __path__=[])
    vars(smp).update(dict.fromkeys(("istype", "listinstr", "process_punctuation")))  # imported, not called here
    log = ModuleType("vlmeval.smp.log")
    vars(log).update(get_logger=logging.getLogger)
    stand_ins = {"vlmeval": ModuleType("vlmeval"), "vlmeval.smp": smp, "vlmeval.smp.log": log}
    for parent in ("vlmeval.utils", "vlmeval.dataset", "vlmeval.dataset.utils"):
        stand_ins[parent] = ModuleType(parent)
    before = {key: sys.modules.get(key) for key in stand_ins}
    sys.modules.update(stand_ins)
    try:
        return _module(clone / path, name)
    finally:
        for key, module in before.items():
            if module is None:
                del sys.modules[key]
            else:
                sys.modules[key] = module


TOOLKITS: Mapping[str, Callable[[Path, str, Sequence[Record]], list[float] | None]] = {
    "vlmevalkit": vlmevalkit,
    "cambrian": cambrian,
}
