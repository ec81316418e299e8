"""The table in its media."""

from __future__ import annotations

from typing import Any

from dpa.evaluate.tables import accuracy_table, percent


def result(accuracy: float, blind: float | None, **kinds: float) -> dict[str, Any]:
    return {
        "n": 1600,
        "accuracy": accuracy,
        "accuracy_interval": [accuracy - 0.02, accuracy + 0.02],
        "mean_over_kinds": accuracy,
        "blind_accuracy": blind,
        "blind_mean_over_kinds": blind,
        "chance": 1 / 3,
        "by_kind": {
            kind: {"n": 200, "accuracy": value, "blind_accuracy": blind, "chance": 0.25}
            for kind, value in kinds.items()
        },
    }


RESULTS = {"dpa": result(0.7, 0.3, colour=0.81234, count=0.5), "vanilla": result(0.6, None, colour=0.6)}


def test_rows_and_columns() -> None:
    table = accuracy_table(RESULTS)
    assert table.methods == ("dpa", "vanilla")
    assert [row.name for row in table.rows] == ["colour", "count", "mean over kinds", "all questions"]
    assert [row.total for row in table.rows] == [False, False, True, True]
    colour, count, _, everything = table.rows
    assert [(cell.accuracy, cell.blind) for cell in colour.cells] == [("81.2", "30.0"), ("60.0", "–")]
    assert [cell.accuracy for cell in count.cells] == ["50.0", "–"]
    assert [cell.interval for cell in everything.cells] == ["68.0–72.0", "58.0–62.0"]
    assert (everything.n, everything.chance) == ("1600", "33.3")


def test_markdown() -> None:
    lines = accuracy_table(RESULTS).markdown().split("\n")
    assert lines[0] == "| % right | n | dpa | blind | vanilla | blind | chance |"
    assert lines[1].count("---:") == 6
    assert lines[2] == "| colour | 200 | 81.2 | 30.0 | 60.0 | – | 25.0 |"
    assert lines[-2] == "| **all questions** | **1600** | **70.0** | **30.0** | **60.0** | **–** | **33.3** |"
    assert lines[-1] == "| 95 % interval |  | 68.0–72.0 |  | 58.0–62.0 |  |  |"
    assert len({line.count("|") for line in lines}) == 1


def test_two_methods_fit_into_a_terminal() -> None:
    text = accuracy_table(RESULTS).text(title="lab")
    assert max(map(len, text.split("\n"))) <= 80
    assert "81.2" in text
    assert text.startswith("lab")


def test_names_are_shown_as_they_are() -> None:
    text = accuracy_table({"a|b [red]": RESULTS["dpa"]})
    assert "a|b [red]" in text.text()
    assert "a\\|b [red]" in text.markdown()


def test_columns_about_different_questions_show_both_numbers() -> None:
    table = accuracy_table({"one": RESULTS["dpa"], "other": {**RESULTS["dpa"], "n": 400}})
    assert table.rows[-1].n == "1600 / 400"


def test_percent() -> None:
    assert (percent(0.12345), percent(1.0), percent(None)) == ("12.3", "100.0", "–")
