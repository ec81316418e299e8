"""Methods side by side."""

from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from dpa.analyze.compare import compare_runs, paired_difference, paper_rows, render
from dpa.errors import UserError
from dpa.evaluate.scores import PREDICTIONS, scores_path, write_results, write_scores
from dpa.evaluate.settings import PAPER
from tests.unit.analyze.conftest import result, scored, write_run


def test_paired_difference() -> None:
    found = paired_difference(scored(30), reversed(scored(20)))
    assert found is not None
    difference, (low, high), n, groups = found
    assert (difference, n, groups) == (0.25, 40, 20)
    assert 0 < low < 0.25 < high < 0.5
    assert paired_difference(scored(30), scored(30)) == (0, (0, 0), 40, 20)


def test_pairing_needs_the_same_questions() -> None:
    assert paired_difference(scored(30), scored(30)[1:]) is None
    moved = [replace(item, group="elsewhere") for item in scored(30)]
    assert paired_difference(scored(30), moved) is None
    assert paired_difference([], []) is None


def test_one_run(run_folder: Path) -> None:
    comparison = compare_runs([run_folder])
    assert list(comparison.results["lab"]) == ["dpa", "vanilla"]
    (difference,) = comparison.differences
    assert (difference.column, difference.baseline, difference.difference) == ("dpa", "vanilla", 0.25)
    found = json.loads(json.dumps(comparison.to_dict()))
    assert found["results"]["lab"]["vanilla"]["accuracy"] == 0.5
    assert found["differences"][0]["interval"][0] > 0
    assert "dpa - vanilla: +25.0 points" in comparison.text()
    assert "| **all questions** | **40** | **75.0** |" in comparison.markdown()


def test_several_runs_use_their_own_baseline_or_the_first(tmp_path: Path) -> None:
    first = write_run(tmp_path / "a", {"dpa": 30, "vanilla": 20}, name="a")
    second = write_run(tmp_path / "b", {"cal": 22}, name="b")
    third = write_run(tmp_path / "c", {"vanilla": 10, "dpa": 30}, name="c")
    comparison = compare_runs([first, second, third])
    assert list(comparison.results["lab"]) == ["a/dpa", "a/vanilla", "b/cal", "c/vanilla", "c/dpa"]
    assert [(item.column, item.baseline, item.difference) for item in comparison.differences] == [
        ("a/dpa", "a/vanilla", 0.25),
        ("b/cal", "a/vanilla", pytest.approx(0.05)),
        ("c/dpa", "c/vanilla", 0.5),
    ]


def test_without_vanilla_the_first_column_is_the_baseline(tmp_path: Path) -> None:
    comparison = compare_runs([write_run(tmp_path / "a", {"dpa": 30, "cal": 30})])
    assert [(item.column, item.baseline) for item in comparison.differences] == [("cal", "dpa")]
    assert "not distinguishable" in comparison.text()


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / place / "run", {"dpa": 30}, name="run") for place in "xy"]
    assert list(compare_runs(folders).results["lab"]) == [f"{folder}/dpa" for folder in folders]


def test_what_cannot_be_paired_is_said(run_folder: Path) -> None:
    path = scores_path(run_folder / "vanilla" / PREDICTIONS, "lab")
    write_scores(path, scored(20)[:-1])
    comparison = compare_runs([run_folder])
    assert comparison.differences == ()
    assert "answered different questions" in comparison.text()
    path.unlink()
    assert "stored scores are missing" in compare_runs([run_folder]).markdown()


def test_nothing_evaluated_is_a_message(run_folder: Path) -> None:
    path = run_folder / "summary.json"
    summary = json.loads(path.read_text())
    for method in summary["methods"].values():
        method["evaluation"] = {}
    path.write_text(json.dumps(summary))
    with pytest.raises(UserError, match="nothing to compare"):
        compare_runs([run_folder])


def write_scored(folder: Path, right: dict[str, int], **more: object) -> Path:
    """A folder that ``dpa eval --out`` wrote."""
    for name, count in right.items():
        write_scores(scores_path(folder, name), scored(count))
    write_results(folder, "checkpoint", {name: {**result(count), **more} for name, count in right.items()})
    return folder


def test_folders_of_scores_and_checkpoints(tmp_path: Path) -> None:
    first = write_scored(tmp_path / "ours", {"mmvp": 30, "ai2d": 20, "lab": 10})
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "config.json").touch()
    with pytest.raises(UserError, match=r"not evaluated \(.*theirs\.eval is missing\): dpa eval .*theirs"):
        compare_runs([first, tmp_path / "theirs"])
    write_scored(tmp_path / "theirs.eval", {"mmvp": 28, "ai2d": 24})
    comparison = compare_runs([first, tmp_path / "theirs"])
    table = comparison.table
    assert table.benchmarks == ("ai2d", "mmvp", "lab", "average")
    ours, theirs = table.rows
    assert (ours.name, theirs.name) == ("ours", "theirs")
    assert {name: number.value for name, number in ours.numbers.items()} == {
        "ai2d": 50.0,
        "mmvp": 75.0,
        "lab": 25.0,
        "average": 62.5,  # of the paper's benchmarks: without the lab
    }
    assert (ours.wins, theirs.wins) == (1, 1)
    low, high = ours.numbers["average"].interval or (0, 0)
    single = ours.numbers["mmvp"].interval or (0, 0)
    assert single[0] < 75 < single[1]
    assert low < 62.5 < high
    assert high - low < single[1] - single[0], "a mean of two benchmarks is surer than one"
    of = {item.benchmark: item for item in comparison.differences}
    assert set(of) == {"ai2d", "mmvp", "average"}, "theirs minus ours, where both have scores"
    assert of["average"].difference == pytest.approx((of["ai2d"].difference + of["mmvp"].difference) / 2)
    assert of["average"].column == "theirs"
    assert of["ai2d"].groups_won == 2
    assert compare_runs([first, tmp_path / "theirs"], baseline="theirs").differences[0].column == "ours"
    with pytest.raises(UserError, match=r"no column 'x'.*ours, theirs"):
        compare_runs([first, tmp_path / "theirs"], baseline="x")


def seeds(tmp_path: Path, right: dict[str, tuple[int, ...]]) -> list[Path]:
    """One run per seed."""
    folders = []
    for seed in range(len(next(iter(right.values())))):
        folder = write_run(tmp_path / f"s{seed}", {name: of[seed] for name, of in right.items()}, name=f"lab-s{seed}")
        summary = json.loads((folder / "summary.json").read_text())
        (folder / "summary.json").write_text(json.dumps({**summary, "seed": seed}))
        folders.append(folder)
    return folders


def test_seeds_are_one_column(tmp_path: Path) -> None:
    folders = seeds(tmp_path, {"dpa": (30, 32, 34), "vanilla": (20, 20, 20)})
    comparison = compare_runs(folders)
    dpa, vanilla = comparison.table.rows
    assert (dpa.name, dpa.seeds) == ("dpa (3 seeds)", 3)
    assert dpa.numbers["lab"].value == 80
    assert dpa.numbers["lab"].sem == pytest.approx(100 * 0.05 / 3**0.5)
    assert vanilla.numbers["lab"].sem == 0
    (difference,) = comparison.differences
    assert difference.difference == pytest.approx(0.3)
    assert "80.0 ± 2.9" in comparison.text()
    apart = compare_runs(folders, combine=False)
    assert len(apart.table.rows) == 6
    assert comparison.results["lab"][dpa.name]["by_kind"]["colour"]["accuracy"] == pytest.approx(0.8)


def test_other_recipes_or_equal_seeds_stay_apart(tmp_path: Path) -> None:
    folders = seeds(tmp_path, {"dpa": (30, 32)})
    recipe = folders[1] / "recipe.yaml"
    recipe.write_text(recipe.read_text() + "train: {precision: bf16}\n")
    assert len(compare_runs(folders).table.rows) == 2
    again = [write_run(tmp_path / place, {"dpa": 30}, name="x") for place in "ab"]
    assert len(compare_runs(again).table.rows) == 2


def test_rows_of_the_paper_where_the_setting_matches(tmp_path: Path) -> None:
    paper = {"paper: dpa": {"mmvp": 40.0, "average": 51.7, "docvqa": 1.0}}
    folders = [write_scored(tmp_path / "a", {"mmvp": 30, "ai2d": 20}, profile="paper")]
    comparison = compare_runs(folders, paper=paper)
    (row,) = comparison.table.paper
    assert {name: number.value for name, number in row.numbers.items()} == {"mmvp": 40.0}
    assert "averages are left out: they are of seven benchmarks, MMBench, DocVQA" in comparison.notes[0]
    assert (row.wins, row.numbers["mmvp"].interval) == (None, None)
    strict = write_scored(tmp_path / "b", {"mmvp": 30}, profile="strict")
    comparison = compare_runs([strict], paper=paper)
    assert comparison.table.paper == ()
    assert "left out: b, mmvp: profile strict" in comparison.text()
    part = write_scored(tmp_path / "c", {"mmvp": 30}, partial=True)
    assert "answered a part of mmvp" in compare_runs([part], paper=paper).notes[0]


def test_formats(tmp_path: Path) -> None:
    folders = [
        write_scored(tmp_path / "a_b & 50%", {"mmvp": 30, "ai2d": 20}),
        write_scored(tmp_path / "c|d", {"mmvp": 20}),
    ]
    comparison = compare_runs(folders, paper={"paper: dpa_2": {"mmvp": 51.7}})
    latex = render(comparison, "latex")
    assert "\\begin{tabular}{lrrrr}" in latex
    assert "% right & AI2D & MMVP & average & wins \\\\".replace("%", "\\%") in latex
    assert re.search(r"^a\\_b \\& 50\\% & 50\.0 \{\\scriptsize \[[\d.]+--[\d.]+\]\} & \\textbf\{75\.0\}", latex, re.M)
    assert "\\midrule\npaper: dpa\\_2 & -- & 51.7 & -- &  \\\\\n\\bottomrule" in latex
    markdown = render(comparison, "markdown").split("\n\n")[0].split("\n")
    assert markdown[0] == "| % right | AI2D | MMVP | average | wins |"
    assert len({line.replace("\\|", "").count("|") for line in markdown}) == 1
    assert "**75.0**" in markdown[2]
    rows = list(csv.DictReader(io.StringIO(render(comparison, "csv"))))
    assert [(row["method"], row["benchmark"], row["value"], row["source"]) for row in rows][-2:] == [
        ("c|d", "mmvp", "50.0", "measured"),
        ("paper: dpa_2", "mmvp", "51.7", "paper"),
    ]
    found = json.loads(render(comparison, "json"))
    assert found["table"]["rows"][0]["numbers"]["mmvp"]["value"] == 75
    assert "95 % interval" in render(comparison, "text")
    with pytest.raises(UserError, match="choose text, markdown, latex, csv, json"):
        render(comparison, "html")


def test_rankings_are_no_benchmark(tmp_path: Path) -> None:
    folder = write_scored(tmp_path / "a", {"lab": 30})
    write_scores(scores_path(folder, "lab.ranked"), scored(20))
    assert compare_runs([folder]).table.benchmarks == ("lab",)


def test_weights_make_strata(tmp_path: Path) -> None:
    """As CV-Bench: a source of 10 units weighs as much as one of 30."""
    scores = [replace(item, group=item.id, weight=1 / 10 if n < 10 else 1 / 30) for n, item in enumerate(scored(10))]
    write_scores(scores_path(tmp_path / "a", "cvbench"), scores)
    (row,) = compare_runs([tmp_path / "a"]).table.rows
    assert row.numbers["cvbench"].value == pytest.approx(50)
    assert row.numbers["cvbench"].interval == pytest.approx((50, 50)), "each source's share of the number is fixed"


def test_the_papers_averages_below_all_seven(tmp_path: Path) -> None:
    folder = write_scored(tmp_path / "a", dict.fromkeys(PAPER, 20))
    comparison = compare_runs([folder], paper=paper_rows("qwen2.5-7b/sharegpt4v"))
    assert comparison.notes == ()
    assert [row.numbers["average"].value for row in comparison.table.paper] == [49.0, 51.0, 51.7]
    assert comparison.table.rows[0].numbers["average"].value == pytest.approx(50)
    assert comparison.table.benchmarks == (*PAPER, "average")
    with pytest.raises(UserError, match="no row 'x' of the paper"):
        paper_rows("x")


def write_folder(folder: Path, name: str, **others: object) -> Path:
    write_scores(scores_path(folder, name), scored(20))
    write_results(folder, str(folder), {name: {**result(20), "profile": "paper", "vlmevalkit": "2025-05", **others}})
    return folder


def test_numbers_of_different_rules_are_no_table(tmp_path: Path) -> None:
    ours = write_folder(tmp_path / "ours", "ai2d")
    with pytest.raises(UserError, match="profile of ours, ai2d: paper; strict, ai2d: strict"):
        compare_runs([ours, write_folder(tmp_path / "strict", "ai2d", profile="strict")])
    with pytest.raises(UserError, match="profile of ours, ai2d: paper; other, mmvp: strict"):
        compare_runs([ours, write_folder(tmp_path / "other", "mmvp", profile="strict")])
    with pytest.raises(UserError, match="vlmevalkit of ours, ai2d: 2025-05; new, ai2d: 2026-08"):
        compare_runs([ours, write_folder(tmp_path / "new", "ai2d", vlmevalkit="2026-08")])
    other = write_folder(tmp_path / "mmvp", "mmvp", vlmevalkit="2026-08")  # which does not concern MMVP
    assert len(compare_runs([ours, other]).table.rows) == 2


def test_partial_numbers_are_said_to_be(tmp_path: Path) -> None:
    folders = [write_folder(tmp_path / "ours", "ai2d"), write_folder(tmp_path / "part", "ai2d", partial=True)]
    for text in (compare_runs(folders).text(), compare_runs(folders).latex()):
        assert "ai2d: part answered a part of the questions (--limit)" in text


def test_latex_says_whose_difference(run_folder: Path) -> None:
    assert "% lab: dpa - vanilla: +25.0 points" in compare_runs([run_folder]).latex()
