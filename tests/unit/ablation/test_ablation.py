"""A small grid for real: shared stages, a failed start that continues, tables, pictures, the page."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import dpa
from dpa.ablation.collect import Measured, Results, better, collect, mean_of, samples_to, samples_to_probe, shown_as
from dpa.ablation.figures import COLOURS, looks
from dpa.ablation.grid import cells_of, load_ablation
from dpa.ablation.report import write_report
from dpa.ablation.run import look_ahead, run_cells
from dpa.cli import app
from dpa.errors import DpaError, RecipeError, UserError
from dpa.testing.project import write_project

FILE = """
name: grid
base: recipe.yaml
methods: [vanilla, pmo, dpa]
seeds: [0, 1]
axes: {answers: {few: {stages.finetune.max_steps: 1}, many: {stages.finetune.max_steps: 2}}}
set: {stages.proxy.max_steps: 1, stages.pretrain.max_steps: 1}
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = write_project(tmp_path_factory.mktemp("ablation") / "project")
    path = recipe.parent / "grid.yaml"
    path.write_text(FILE + f"output: {recipe.parent / 'runs'}\n")
    return path


def test_a_grid(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ablation = load_ablation(file)
    cells = cells_of(ablation)
    before = look_ahead(cells)
    # per seed: one proxy for two methods, a stage 2 for each of three, two stage 3 for each of those
    assert (before.cells, before.finished, before.different, before.to_train) == (12, 0, 2 * (1 + 3 + 6), 20)
    assert before.stages == 12 * 2 + 8
    done: list[str] = []
    real = dpa.run

    def dies_in_the_third(recipe: Any) -> Any:
        done.append(recipe.name)
        if len(done) == 3:
            raise DpaError("no space left")
        return real(recipe)

    monkeypatch.setattr("dpa.ablation.run.run", dies_in_the_third)
    failures = run_cells(cells[:4], tell=lambda line: None)
    assert [failure.message for failure in failures] == ["no space left"]
    assert failures[0].title == cells[2].title
    monkeypatch.setattr("dpa.ablation.run.run", real)
    lines: list[str] = []
    assert run_cells(cells, tell=lines.append) == []
    assert sum("finished before" in line for line in lines) == 3
    after = look_ahead(cells)
    assert (after.finished, after.to_train, after.steps) == (12, 0, 0)
    store = ablation.output / ".store"
    assert len([entry for entry in store.iterdir() if entry.is_dir() and entry.name[0] != "."]) == 20

    result = CliRunner().invoke(app, ["ablate", str(file), "--json"])
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["rows"]
    assert {row["metric"] for row in rows} >= {"proxy.loss", "pretrain.loss", "finetune.loss"}
    mine = next(
        row
        for row in rows
        if row["point"] == {"answers": "few"} and row["method"] == "dpa" and row["metric"] == "finetune.loss"
    )
    assert set(mine["values"]) == {"0", "1"}
    assert mine["mean"] == pytest.approx(sum(mine["values"].values()) / 2)
    assert mine["difference"]["won"] in (0, 1, 2)
    folder = ablation.folder
    table = list(csv.DictReader((folder / "results.csv").open()))
    assert {row["answers"] for row in table} == {"few", "many"}
    page = (folder / "report.html").read_text()
    assert "finetune.loss" in page
    assert "http" not in page.replace("http-equiv", ""), "opens offline"
    assert {path.suffix for path in (folder / "figures").iterdir()} == {".png", ".svg"}
    assert (folder / "figures" / "finetune.loss-answers.png").stat().st_size > 1000


def test_what_is_wrong_stops_at_once(file: Path) -> None:
    ablation = load_ablation(file, ["data.captions.path=/nowhere.json", "name=wrong"])
    with pytest.raises(UserError, match=r"cell answers few, vanilla, seed 0: .*nowhere"):
        look_ahead(cells_of(ablation))
    with pytest.raises(UserError, match="none of 12 runs has a result"):
        collect(ablation, cells_of(ablation))
    assert CliRunner().invoke(app, ["ablate", str(file), "--seeds", "x"]).exception.__class__ is RecipeError


def test_the_page_says_better_worse_and_of_how_many_seeds(file: Path, tmp_path: Path) -> None:
    soon = "pretrain.samples_to.visual_logp_a"
    ablation = load_ablation(file, [f"output={tmp_path}"]).model_copy(update={"metrics": ("lab.accuracy", soon)})
    right = {"vanilla": 0.5, "pmo": 0.6, "dpa": 0.4}
    measured = []
    for cell in cells_of(ablation):
        figures = {"lab.accuracy": right[cell.method] + 0.01 * cell.seed}
        if cell.method == "pmo":
            figures[soon] = 700.0 + cell.seed
        elif cell.seed == 0 or cell.method == "vanilla":
            figures[soon] = 900.0 + cell.seed
        measured.append(Measured(cell, figures, ()))
    ablation.folder.mkdir()
    page = write_report(Results(ablation, tuple(measured), ()), ()).read_text(encoding="utf-8")
    assert page.count('<small class="better">+10.0 ± 0.0') == 2, "at both points"
    assert page.count('<small class="worse">-10.0 ± 0.0') == 2
    assert page.count('<small class="better">-200 ± 0') == 2, "fewer samples are better"
    assert page.count("900 [1 of 2 seeds]") == 2


def test_means() -> None:
    assert mean_of([]) is None
    single = mean_of([0.25])
    assert single is not None
    assert (single.mean, single.half) == (0.25, None)
    several = mean_of([1.0, 2.0, 3.0, 4.0, 5.0])
    assert several is not None
    assert several.half == pytest.approx(2.776 * math.sqrt(2.5) / math.sqrt(5))
    assert several.text() == "3.0 ± 2.0"


def test_samples_to_threshold() -> None:
    curve = [(8.0 * (step + 1), 1.0 if step < 50 else 0.0) for step in range(100)]
    assert samples_to(curve, 0.5) == 8.0 * 61  # eleven of the last twenty are 0
    assert samples_to(curve, -1.0) is None
    assert samples_to(curve, None) is None
    assert samples_to(curve[:5], 0.5) is None


def test_samples_to_a_probe() -> None:
    curve = [(8.0 * (step + 1), 1.0) for step in range(100)]
    probes = [{"step": step, "seen": seen} for step, seen in ((25, -2.0), (50, -1.8), (100, -1.3))]
    assert samples_to_probe(curve, probes, "seen", -1.8) == 8.0 * 50
    assert samples_to_probe(curve, probes, "seen", -1.55) == pytest.approx(8.0 * 75)
    assert samples_to_probe(curve, probes, "seen", -3.0) == 8.0 * 25
    assert samples_to_probe(curve, probes, "seen", -1.0) is None
    assert samples_to_probe(curve, probes, "other", -9.0) is None
    assert samples_to_probe(curve, [], "seen", -9.0) is None


def test_what_is_better() -> None:
    assert better("pretrain.samples_to.seen", 100, 200)
    assert shown_as("pretrain.samples_to.visual_logp_b") == (1.0, "", 0)
    assert better("lab.accuracy", 0.6, 0.5)
    assert better("pretrain.loss", 0.5, 0.6)
    assert better("pretrain.samples_to_threshold", 100, 200)
    assert shown_as("lab.accuracy") == (100.0, ", %", 1)
    assert shown_as("pretrain.loss")[2] == 3


def test_a_method_looks_the_same_in_every_figure() -> None:
    small, large = looks(["vanilla", "dpa"]), looks(["oracle", "dpa-prior", "dpa", "cmo", "pmo", "cal", "vanilla"])
    assert list(small) == ["vanilla", "dpa"]
    assert small["dpa"] == large["dpa"]
    assert len({look.colour for look in large.values()}) == len(large) <= len(COLOURS)
    own = looks(["neither", "stage-2", "stage-3", "both", "dpa"])
    assert len({(look.colour, look.mark) for look in own.values()}) == 5
    assert len(looks([f"run-{number}" for number in range(20)])) == 20
