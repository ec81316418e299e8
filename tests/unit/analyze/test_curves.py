"""Curves as inline SVG."""

from __future__ import annotations

import re
from xml.etree import ElementTree

from dpa.analyze.curves import POINTS, averaged, loss_panels, weight_panels
from tests.unit.analyze.conftest import metrics

METRICS = {"dpa": metrics("dpa"), "vanilla": metrics("vanilla")}


def lines(svg: str) -> list[str]:
    """Colours of the drawn lines (grid lines excepted)."""
    return [found for found in re.findall(r"stroke: var\((--\w+)\)", svg) if found not in ("--line", "--soft")]


def test_a_panel_per_stage_and_a_line_per_method() -> None:
    panels = loss_panels(METRICS)
    assert [panel.title for panel in panels] == ["proxy", "pretrain", "finetune"]
    assert [lines(panel.svg) for panel in panels] == [["--dpa"], ["--dpa", "--vanilla"], ["--dpa", "--vanilla"]]
    assert "vanilla 0.075" in panels[1].about


def test_weight_health_only_where_weights_differ() -> None:
    panels = weight_panels(METRICS)
    assert [panel.title for panel in panels] == [
        "pretrain: mean weight",
        "pretrain: weights of dpa",
        "finetune: mean weight",
        "finetune: weights of dpa",
    ]
    assert lines(panels[0].svg) == ["--dpa"]
    assert len(lines(panels[1].svg)) == 3
    assert weight_panels({"vanilla": METRICS["vanilla"]}) == []


def test_svgs_live_together_on_a_page() -> None:
    svgs = [panel.svg for panel in [*loss_panels(METRICS), *weight_panels(METRICS)]]
    ids: list[str] = []
    for svg in svgs:
        assert svg.startswith('<svg role="img" aria-label=')
        assert "<style" not in svg, "a style sheet in a picture would dress the whole page"
        assert not re.search(r"https?:|#[0-9a-fA-F]{6}\b|font-family", svg)
        own = re.findall(r'\bid="([^"]*)"', svg)
        assert set(re.findall(r'(?:href="|url\()#([^")]+)', svg)) <= set(own)
        ids += own
        ElementTree.fromstring(svg.replace("<svg ", '<svg xmlns:xlink="x" ', 1))
    assert len(ids) == len(set(ids))


def test_one_input_one_picture() -> None:
    assert [panel.svg for panel in loss_panels(METRICS)] == [panel.svg for panel in loss_panels(METRICS)]


def test_many_steps_are_averaged() -> None:
    rows = [{"step": step, "loss": float(step**2)} for step in range(1, 8)]
    assert averaged(rows, "loss", points=7) == ([1, 2, 3, 4, 5, 6, 7], [1, 4, 9, 16, 25, 36, 49])
    assert averaged(rows, "loss", points=6) == ([1.5, 3.5, 5.5, 7], [2.5, 12.5, 30.5, 49])
    assert averaged(rows, "loss", points=1) == ([4], [20])
    assert averaged([{"step": 1}, {"loss": 2.0}, {"step": 3, "loss": None}], "loss") == ([], [])
    steps, _ = averaged([{"step": step, "loss": 1.0} for step in range(1001)], "loss")
    assert len(steps) <= POINTS


def test_rows_without_figures_are_no_panel() -> None:
    assert loss_panels({"dpa": []}) == []
    assert loss_panels({"dpa": [{"stage": "s", "step": 1}, {"event": "saved"}]}) == []
    assert loss_panels({}) == []
    assert weight_panels({"dpa": [{"stage": "s", "step": 1, "nll": 1.0}]}) == []


def test_unknown_methods_get_ink() -> None:
    (panel,) = loss_panels({'<b>"mine': [{"stage": "s", "step": step, "nll": 1.0 * step} for step in (1, 2)]})
    assert set(lines(panel.svg)) == {"--ink"}  # the line and its markers
    assert "<b>" not in panel.svg
