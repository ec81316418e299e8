"""Our answers to MMVP and CV-Bench as the files that Cambrian's own scorers read: mmvp, ade, coco and omni.jsonl.

python examples/cambrian_answers.py benchmarks-data runs/NAME/checkpoint.eval cambrian-answers
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from dpa.evaluate.data.read import read_benchmark

FILES = {"ADE20K": "ade", "COCO": "coco", "Omni3D": "omni"}


def write_answers(data: Path, predictions: Path, out: Path) -> None:
    """One line per question, in the benchmark's order: MMVP's scorer takes neighbours as pairs."""
    out.mkdir(parents=True, exist_ok=True)
    lines: dict[str, list[str]] = {}
    for name in ("mmvp", "cvbench"):
        text = (predictions / f"{name}.jsonl").read_text(encoding="utf-8")
        said = {record["id"]: record["prediction"] for record in map(json.loads, filter(None, text.split("\n")))}
        for task in read_benchmark(name, data):
            record = task.record
            options = list(record["choices"].values())
            line = {
                "question_id": task.id,
                "answer": said[task.id],
                "gt_answer": f"({str(record['answer']).strip('()').lower()})",
                "model_id": predictions.name,
                "text_options": options,
                "options": options,
                "category": record.get("task", ""),
            }
            file = "mmvp" if name == "mmvp" else FILES[record["source"]]
            lines.setdefault(file, []).append(json.dumps(line, ensure_ascii=False) + "\n")
    for file, rows in lines.items():
        (out / f"{file}.jsonl").write_text("".join(rows), encoding="utf-8")


if __name__ == "__main__":
    write_answers(*map(Path, sys.argv[1:]))
