"""Questions per second of an evaluation: batched by length against one by one, and on several devices.

    python benchmarks/eval.py [--json] [--out FILE] [--questions 96] [--batch-size 32] [--devices 1] [--new 16]

The shipped lab parts, with a connector that is not trained (its answers are wrong, and of full length or not as it
happens: all variants decode the same tokens), asked the lab's questions about pictures drawn for it. Answers of all
variants must be equal; the command fails where they are not. Variants take turns; the best of the repeats counts.
Loading is not part of it, reading pictures is. ``option ranking`` scores every choice of the same questions.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from benchkit.machine import describe_machine, format_table

from dpa.evaluate.devices import Devices, device_names
from dpa.evaluate.generate import Question, generate_answers
from dpa.evaluate.load import load_model, open_processor
from dpa.evaluate.rank import Choices, rank_options
from dpa.lab.questions import CHOICES, balanced_questions
from dpa.lab.render import render
from dpa.lab.scenes import draw_scene
from dpa.log import quiet_libraries
from dpa.models.checkpoint_io import save_checkpoint
from dpa.models.settings import ModelSettings
from dpa.models.vlm import build_vlm

PER_SCENE = 4


@dataclass(frozen=True)
class Row:
    """One variant."""

    name: str
    seconds: float
    cpu_seconds: float
    """Of this process: what to compare on a busy machine. Other devices' processes are not in it."""
    questions_per_s: float
    questions_per_cpu_s: float
    tokens_per_s: float | None
    """New ones; None where nothing is generated."""
    ratio: float
    """To one by one, in CPU time; with several devices, or on an accelerator, in wall time."""


def lab_questions(folder: Path, count: int) -> list[Choices]:
    """Questions about drawn scenes, with their choices."""
    scenes = [draw_scene(11, index, minimum=2) for index in range(count // PER_SCENE + 1)]
    asked = balanced_questions(scenes, PER_SCENE, seed=11)[:count]
    assert len(asked) == count, (len(asked), count)
    for scene in scenes:
        render(scene).save(folder / f"{scene.key}.png".replace("/", "-"))
    return [
        Choices(
            Question(str(number), of.text, (folder / f"{scene.key}.png".replace("/", "-"),)), tuple(CHOICES[of.form])
        )
        for number, (scene, of) in enumerate(asked)
    ]


def best_of(
    repeats: int, variants: dict[str, Callable[[], Any]]
) -> tuple[dict[str, tuple[float, float]], dict[str, Any]]:
    """Wall and CPU seconds, and results, of each; they take turns."""
    seconds: dict[str, tuple[float, float]] = {}
    results: dict[str, Any] = {}
    for _ in range(repeats):
        for name, call in variants.items():
            began, used = time.perf_counter(), time.process_time()
            results[name] = call()
            wall, cpu = time.perf_counter() - began, time.process_time() - used
            before = seconds.get(name, (wall, cpu))
            seconds[name] = (min(before[0], wall), min(before[1], cpu))
    return seconds, results


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    choices = lab_questions(folder, arguments.questions)
    questions = [item.question for item in choices]
    vlm = build_vlm(ModelSettings(llm="lab:llm", vision_tower="lab:tower"), seed=0)
    save_checkpoint(vlm, folder / "checkpoint")
    checkpoint, names = str(folder / "checkpoint"), device_names(arguments.devices)
    processor, model = open_processor(checkpoint), load_model(checkpoint, names[0])
    settings = {"max_new_tokens": arguments.new}
    batched = f"batches of {arguments.batch_size}"
    with ExitStack() as stack:
        variants: dict[str, Callable[[], Any]] = {
            "one by one": lambda: generate_answers(model, processor, questions, batch_size=1, **settings),
            batched: lambda: generate_answers(model, processor, questions, batch_size=arguments.batch_size, **settings),
        }
        if len(names) > 1:
            copies = stack.enter_context(Devices(checkpoint, names))
            variants[f"{batched}, {len(names)} devices"] = lambda: generate_answers(
                copies, processor, questions, batch_size=arguments.batch_size, **settings
            )
        variants["option ranking"] = lambda: rank_options(model, processor, choices, batch_size=arguments.batch_size)
        seconds, results = best_of(arguments.repeats, variants)
    answers = {name: result for name, result in results.items() if name != "option ranking"}
    for name, result in answers.items():
        different = [one.id for one, other in zip(answers["one by one"], result, strict=True) if one != other]
        if different:
            sys.exit(f"{name}: {len(different)} answers differ from one by one, such as question {different[0]}")
    tokens = sum(answer.tokens for answer in answers["one by one"])
    rows = []
    for name, (wall, cpu) in seconds.items():
        clock = 1 if names[0] == "cpu" and "devices" not in name else 0
        rows.append(
            Row(
                name=name,
                seconds=wall,
                cpu_seconds=cpu,
                questions_per_s=len(questions) / wall,
                questions_per_cpu_s=len(questions) / cpu,
                tokens_per_s=tokens / wall if name in answers else None,
                ratio=seconds["one by one"][clock] / (wall, cpu)[clock],
            )
        )
    return {
        "questions": len(questions),
        "different_answers": len({answer.prediction for answer in answers["one by one"]}),
        "new_tokens": tokens,
        "options": sum(len(item.options) for item in choices),
        "equal_answers": True,
        "rows": [asdict(row) for row in rows],
        "machine": describe_machine(torch.device(names[0])),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=96)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--new", type=int, default=16, help="new tokens at most")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="JSON on stdout, nothing else")
    parser.add_argument("--out", type=Path, help="also write the JSON there")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    quiet_libraries()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(chosen, Path(folder))
    text = json.dumps(result, indent=2)
    if chosen.out is not None:
        chosen.out.write_text(text + "\n", encoding="utf-8")
    if chosen.json:
        print(text)
        return
    figures = [
        [
            row["name"],
            f"{row['questions_per_s']:.1f}",
            f"{row['questions_per_cpu_s']:.1f}",
            "-" if row["tokens_per_s"] is None else f"{row['tokens_per_s']:.0f}",
            f"{row['ratio']:.2f}",
        ]
        for row in result["rows"]
    ]
    print(format_table(["variant", "questions/s", "per CPU s", "new tokens/s", "ratio"], figures))
    print(f"{result['questions']} questions, {result['different_answers']} different answers, equal in all variants")


if __name__ == "__main__":
    main()
