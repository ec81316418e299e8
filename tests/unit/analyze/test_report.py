"""The report: complete, self-contained, and safe against what stands in answers."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from dpa.analyze.report import duration, write_report
from dpa.errors import UserError


class Page(HTMLParser):
    """Tags with attributes, and the visible text."""

    VOID = ("meta", "img", "br", "link")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words += data.split()

    @property
    def text(self) -> str:
        return " ".join(self.words)


def page(folder: Path) -> Page:
    return Page(write_report(folder).read_text(encoding="utf-8"))


def test_says_what_was_run_and_what_came_out(run_folder: Path) -> None:
    found = page(run_folder)
    assert found.open == []
    for words in (
        "quickstart",
        "methods dpa, vanilla",
        "LLM lab:llm",
        "vision tower lab:tower",
        "all questions 40 75.0 25.0 65.0–85.0 50.0 25.0 40.0–60.0 25.0",
        "dpa minus vanilla: +25.0 points",
        "dpa: 2.5 % empty",
        "right answer red dpa red vanilla (empty)",
        "Loss Nats per supervised token",
        "pretrain: weights of dpa",
        "dpa pretrain 40 1 min 15 s 4 000 1 234 567 3.000 → 0.075",
        "torch 2.13",
        "cores 2",
        "vision_tower: 'lab:tower'",
    ):
        assert words in found.text, words
    assert found.text.count("reused") == 2  # the row and the note
    assert "None" not in found.text


def test_is_self_contained(run_folder: Path) -> None:
    found = page(run_folder)
    assert not [tag for tag, _ in found.tags if tag in ("script", "link", "iframe", "object", "embed", "base")]
    for tag, attributes in found.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), f"<{tag} {name}>"
            if name == "src":
                assert value is not None
                assert value.startswith("data:image/")
            if name in ("href", "xlink:href"):
                assert value is not None
                assert not re.match(r"(?i)[a-z]+:|//", value)
    html = (run_folder / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"https?://|@import|url\((?!#)", html)
    assert "prefers-color-scheme: dark" in html
    assert 'name="viewport"' in html


def test_pictures(run_folder: Path) -> None:
    found = page(run_folder)
    small, large = [attributes for tag, attributes in found.tags if tag == "img"]
    assert small.get("class") == "pixel"
    assert large.get("class") is None
    assert large["src"] is not None
    with Image.open(io.BytesIO(base64.b64decode(large["src"].partition(",")[2]))) as picture:
        assert picture.size == (640, 640)
    assert found.text.count("picture not found") == 1  # the path that leaves the data's folder


@pytest.mark.parametrize(
    "image",
    [
        "https://example.org/pixel.png",
        "data:image/svg+xml;base64,PHN2Zz4=",
        'data:image/png;base64,AAAA" onerror="alert(1)',
        "data:text/html;base64,AAAA",
        "missing.png",
    ],
)
def test_only_pictures_are_embedded(image: str, run_folder: Path) -> None:
    samples = json.loads((run_folder / "samples.json").read_text())
    (run_folder / "samples.json").write_text(json.dumps([{**samples[0], "image": image}]))
    found = page(run_folder)
    assert "img" not in [tag for tag, _ in found.tags]
    assert "picture not found" in found.text


def test_text_is_text(run_folder: Path) -> None:
    samples = json.loads((run_folder / "samples.json").read_text())
    samples[0]["answers"] = {"dpa": "<script>alert(1)</script>", "<i>": "&amp; \u2028"}
    (run_folder / "samples.json").write_text(json.dumps(samples))
    with open(run_folder / "recipe.yaml", "a", encoding="utf-8") as file:
        file.write("# </code></pre><script>alert(2)</script>\n")
    found = page(run_folder)
    assert "script" not in [tag for tag, _ in found.tags]
    for words in ("what <b>colour</b>?", "<script>alert(1)</script>", "<i>", "&amp;", "<script>alert(2)</script>"):
        assert words in found.text


def test_an_unfinished_run_has_a_report_too(run_folder: Path) -> None:
    summary = json.loads((run_folder / "summary.json").read_text())
    summary["methods"] = {"dpa": {"stages": {}, "evaluation": {}}, "vanilla": {"stages": {}, "evaluation": {}}}
    del summary["seconds"]
    (run_folder / "summary.json").write_text(json.dumps(summary))
    for name in ("samples.json", "metrics.jsonl", "recipe.yaml", "vanilla/metrics.jsonl"):
        (run_folder / name).unlink()
    found = page(run_folder)
    assert found.open == []
    assert "quickstart" in found.text
    for heading in ("Accuracy", "Sample answers", "Loss", "Stages"):
        assert heading not in found.words


def test_no_run_is_a_message(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run's folder"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (9.94, "9.9 s"), (42.4, "42 s"), (59.6, "1 min 0 s"), (185, "3 min 5 s"), (7620, "2 h 7 min")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text
