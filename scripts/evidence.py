"""The lab study's tables and pictures: ``python scripts/evidence.py RUN... [--figures FOLDER]`` (docs/evidence.md).

Each RUN is a run of the lab with ``evaluate.after_pretrain`` and ``evaluate.probe_steps``; runs that differ by seed
alone are one sample. Prints Markdown: accuracy after stage 2 (original LLM, no instruction yet) and after stage 3, what
the connector did to visual and to linguistic words, ROC-AUC of the weights against the truth. Means over seeds with
95 % t-intervals; differences are paired by seed.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dpa.ablation.collect import mean_of, samples_to_probe
from dpa.ablation.figures import looks
from dpa.analyze.runs import PROBES, Run, read_run
from dpa.objectives import OBJECTIVES
from dpa.pipeline.measure import MEASUREMENTS, read_probes
from dpa.recipe import METHODS, MethodName

BASELINE = "vanilla"
ORACLE = "oracle"
"""Stage 2 through the proxy with weights from the true labels: the ceiling of what weights can do there."""
LEVELS = {"captions_a.json": "A", "captions_b.json": "B"}
SEEN = {"a": -1.0, "b": -1.75}
"""Nats of a visual word in the captions' language: about half way from what its text alone gives it to the end."""
RELEVANCES = (("cmo", "CMO"), ("cal", "CAL"), ("prior", "PRIOR"))


@dataclass(frozen=True, slots=True)
class Cell:
    """One method of one run."""

    level: str
    """Language of the captions."""
    method: str
    seed: int
    figures: dict[str, float]
    probes: list[dict[str, float]]


Cells = Sequence[Cell]


def main() -> None:
    """Prints, and draws where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--baseline", default=BASELINE, help="method that all others are compared with")
    parser.add_argument("--figures", type=Path, help="folder for the pictures (PNG and SVG)")
    options = parser.parse_args()
    cells = [cell for folder in options.runs for cell in cells_of(read_run(folder))]
    for level in dict.fromkeys(cell.level for cell in cells):
        mine = [cell for cell in cells if cell.level == level]
        print(f"\n### Captions in {level}\n")
        print("\n".join(accuracy_table(mine, options.baseline)))
        print()
        print("\n".join(word_table(mine)))
        print()
        print("\n".join(auc_table(mine)))
        if options.figures is not None:
            options.figures.mkdir(parents=True, exist_ok=True)
            draw(mine, level, options.figures)


def cells_of(run: Run) -> Iterator[Cell]:
    """The methods of a run that have been measured."""
    recipe = run.recipe()
    level = " + ".join(
        LEVELS.get(Path(source["path"]).name, Path(source["path"]).stem) for source in recipe["data"]["captions"]
    )
    for method in run.methods:
        folder = run.folder_of(method)
        if not (folder / MEASUREMENTS).is_file():
            continue
        figures: dict[str, float] = json.loads((folder / MEASUREMENTS).read_text(encoding="utf-8"))
        for benchmark, result in run.evaluation(method).items():
            figures |= {f"finetune.{benchmark}.{k}": v for k, v in result.items() if isinstance(v, float)}
        probes = read_probes((folder / "connector").resolve().parent / PROBES)
        batch = recipe["stages"]["pretrain"]["global_batch"]
        curve = [(float(batch * step), 0.0) for step in range(1, 1 + int(max((p["step"] for p in probes), default=0)))]
        for language, threshold in SEEN.items():
            reached = samples_to_probe(curve, probes, f"visual_logp_{language}", threshold)
            if reached is not None:
                figures[f"samples_to_{language}"] = reached
        yield Cell(level, name_of(method, recipe), int(recipe["seed"]), figures, probes)


def name_of(method: str, recipe: dict[str, Any]) -> str:
    """The method that does what the run did, under whatever name; what no method does is said."""
    stages, row = recipe["stages"], METHODS[cast(MethodName, method)]
    second, third = (stages[stage]["objective"] or getattr(row, stage) for stage in ("pretrain", "finetune"))
    width = OBJECTIVES[second].window
    if second != "uniform" and stages["pretrain"]["window"] is not None:
        width = stages["pretrain"]["window"]
    if (row.proxy, second, third) == (True, "spans", "uniform"):
        return ORACLE
    smoothed = "" if width == OBJECTIVES[second].window else f", window {width}"
    for name, of in METHODS.items():
        if (of.proxy, of.pretrain, of.finetune) == (row.proxy, second, third):
            return name + smoothed
    return f"{'proxy, ' if row.proxy else ''}{second} in stage 2, {third} in stage 3{smoothed}"


def methods_of(cells: Cells) -> list[str]:
    """In the table's order, all others after them."""
    there = dict.fromkeys(cell.method for cell in cells)
    known = [name for name in (*METHODS, ORACLE) if name in there]
    return known + [name for name in there if name not in known]


def values_of(cells: Cells, method: str, name: str) -> dict[int, float]:
    """Seed -> figure."""
    return {cell.seed: cell.figures[name] for cell in cells if cell.method == method and name in cell.figures}


def shown(values: Sequence[float], *, scale: float = 1.0, digits: int = 1) -> str:
    """``mean ± half width``; how many, where a cell has fewer than others is the reader's to see in ``seeds``."""
    mean = mean_of(values)
    return "" if mean is None else mean.text(scale=scale, digits=digits)


def difference(cells: Cells, method: str, name: str, baseline: str, *, scale: float = 100.0) -> str:
    """Paired by seed against the baseline: mean ± half width, seeds won."""
    ours, base = values_of(cells, method, name), values_of(cells, baseline, name)
    both = sorted(ours.keys() & base.keys())
    if method == baseline or not both:
        return ""
    deltas = [scale * (ours[seed] - base[seed]) for seed in both]
    mean = mean_of(deltas)
    assert mean is not None
    won = sum((delta < 0) if name.startswith("samples") else (delta > 0) for delta in deltas)
    clear = "**" if mean.half is not None and abs(mean.mean) > mean.half else ""
    return f"{clear}{mean.text(digits=1 if scale == 100 else 0, sign='+')}{clear} ({won}/{len(both)})"


def accuracy_table(cells: Cells, baseline: str) -> list[str]:
    """Accuracy in % after stages 2 and 3, and how soon stage 2 sees."""
    lines = [
        f"| method | seeds | after stage 2, % | - {baseline} (won) | after stage 3, % | - {baseline} (won) | blind, % "
        f"| seen, samples | - {baseline} (won) |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    two, three, blind = "pretrain.lab.accuracy", "finetune.lab.accuracy", "finetune.lab.blind_accuracy"
    soon = f"samples_to_{language_of(cells)}"
    for method in methods_of(cells):
        found = {name: list(values_of(cells, method, name).values()) for name in (two, three, blind, soon)}
        of = "" if len(found[soon]) == len(found[two]) else f" [{len(found[soon])} of {len(found[two])} seeds]"
        row = [
            method,
            str(len(found[two])),
            shown(found[two], scale=100),
            difference(cells, method, two, baseline),
            shown(found[three], scale=100),
            difference(cells, method, three, baseline),
            shown(found[blind], scale=100),
            shown(found[soon], digits=0) + of,
            difference(cells, method, soon, baseline, scale=1),
        ]
        lines.append("| " + " | ".join(row) + " |")
    return lines


def language_of(cells: Cells) -> str:
    """In which a level's captions are probed: B wherever there is some."""
    return "a" if cells[0].level == "A" else "b"


def word_table(cells: Cells) -> list[str]:
    """What the last probe of the model in training and the original LLM say about words."""
    language = language_of(cells)
    columns: tuple[tuple[str, str], ...] = (
        ("visual words, training model", f"probe.last.visual_logp_{language}"),
        ("visual words, original LLM", f"pretrain.probe.visual_logp_{language}"),
        ("linguistic words, original LLM", f"pretrain.probe.linguistic_logp_{language}"),
        ("opening, original LLM", f"pretrain.probe.opening_logp_{language}"),
    )
    lines = ["| method | " + " | ".join(title for title, _ in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for method in methods_of(cells):
        row = [shown(list(values_of(cells, method, name).values()), digits=2) for _, name in columns]
        lines.append(f"| {method} | " + " | ".join(row) + " |")
    return lines


def auc_table(cells: Cells) -> list[str]:
    """ROC-AUC of each raw relevance (before bounds and smoothing) against the truth, first and last probe."""
    language = language_of(cells)
    lines = [
        "| trained with | " + " | ".join(title for _, title in RELEVANCES) + " |",
        "|---" * (1 + len(RELEVANCES)) + "|",
    ]
    for method in methods_of(cells):
        row = []
        for name, _ in RELEVANCES:
            pair = [
                shown(list(values_of(cells, method, f"probe.{when}.auc_{name}_{language}").values()), digits=2)
                for when in ("first", "last")
            ]
            row.append(", ".join(pair) if all(pair) else "")
        lines.append(f"| {method} | " + " | ".join(row) + " |")
    return lines


def draw(cells: Cells, level: str, folder: Path) -> None:
    """Accuracy per seed; words and AUC over the steps of stage 2."""
    language = {"A": "a", "B": "b"}.get(level, "mixed")
    words = language_of(cells)
    with matplotlib.rc_context(
        {"font.size": 9, "svg.hashsalt": "dpa", "axes.spines.top": False, "axes.spines.right": False}
    ):
        figure = Figure(figsize=(9, 3.4), layout="constrained")
        for axes, stage, title in zip(
            figure.subplots(1, 2, sharey=True),
            ("pretrain", "finetune"),
            ("after stage 2", "after stage 3"),
            strict=True,
        ):
            _dots(axes, cells, f"{stage}.lab.accuracy", title)
        _save(figure, folder / f"study-accuracy-{language}")
        figure = Figure(figsize=(10.5, 3.4), layout="constrained")
        names = ("visual_logp", "linguistic_logp", "auc_cmo")
        titles = ("visual words, nats", "linguistic words, nats", "AUC of p_w - p_o")
        for axes, name, title in zip(figure.subplots(1, 3), names, titles, strict=True):
            _lines(axes, cells, f"{name}_{words}", title)
        _save(figure, folder / f"study-words-{language}")


def _dots(axes: Axes, cells: Cells, name: str, title: str) -> None:
    methods = methods_of(cells)
    for place, method in enumerate(methods):
        values = [100 * value for value in values_of(cells, method, name).values()]
        if not values:
            continue
        look = looks(methods)[method]
        mean = mean_of(values)
        assert mean is not None
        axes.plot([place] * len(values), values, look.mark, color=look.colour, alpha=0.45, markersize=5)
        axes.errorbar(place + 0.25, mean.mean, yerr=mean.half or 0.0, fmt="_", color=look.colour, capsize=3)
    axes.set_xticks(range(len(methods)), methods, rotation=30, ha="right")
    axes.set_title(title)
    axes.set_ylabel("held-out questions, % right")
    axes.grid(axis="y", alpha=0.3)


def _lines(axes: Axes, cells: Cells, name: str, title: str) -> None:
    for method, look in looks(methods_of(cells)).items():
        of = [cell.probes for cell in cells if cell.method == method and cell.probes]
        steps = [row["step"] for row in of[0]] if of else []
        means = [statistics.fmean(rows[index][name] for rows in of) for index in range(len(steps))]
        axes.plot(
            steps,
            means,
            color=look.colour,
            marker=look.mark,
            markersize=3,
            label=method,
        )
    axes.set_title(title)
    axes.set_xlabel("step of stage 2")
    axes.grid(alpha=0.3)
    if name.startswith("auc"):
        axes.axhline(0.5, color="#888888", linewidth=0.8, linestyle=":")
        axes.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _save(figure: Figure, path: Path) -> None:
    save: Callable[..., Any] = figure.savefig
    save(path.with_suffix(".png"), dpi=110)
    with matplotlib.rc_context({"svg.hashsalt": "dpa"}):  # the same figure, the same bytes
        save(path.with_suffix(".svg"), metadata={"Date": None})


if __name__ == "__main__":
    main()
