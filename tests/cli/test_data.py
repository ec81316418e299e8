"""``dpa data``: what comes out, on which stream, with which exit code. In this process: imports cost the most."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dpa.cli import main
from tests.unit.data.helpers import caption_row, make_image, write_json


@pytest.fixture
def captions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DPA_STORE", str(tmp_path / "store"))
    for number in range(4):
        make_image(tmp_path / "pictures" / f"{number}.png", (20, 20), seed=number)
    rows = [caption_row(f"s{n}", f"a red circle <b>{n}</b>", image=f"{n}.png") for n in range(5)]
    return write_json(tmp_path / "captions.json", rows)


def call(*arguments: Any) -> int:
    try:
        main([str(item) for item in arguments])
    except SystemExit as exit:
        return int(exit.code or 0)
    return 0


def test_check_as_text_json_and_html(captions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures, page = captions.parent / "pictures", captions.parent / "out" / "report.html"
    common = ("data", "check", captions, "--images", pictures)
    assert call(*common, "--html", page) == 2  # one of five is missing, allowed is one in a hundred
    text = capsys.readouterr().out
    assert "pretrain: plain, max_length 8192" in text
    assert "image missing" in text
    assert "Training would not start (pretrain)" in text
    assert f"{captions}, record 5" in text
    html = page.read_text(encoding="utf-8")
    assert html.count("data:image/jpeg;base64,") == 4
    assert "a red circle &lt;b&gt;0&lt;/b&gt;" in html
    assert "<script" not in html
    assert "http:" not in html
    assert "https:" not in html
    assert "Training would not start" in html
    assert call(*common, "--max-bad-share", "0.2", "--stage", "finetune", "--max-length", "64", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["can_train"]
    (stage,) = found["stages"]
    assert (stage["stage"], stage["format"], stage["max_length"], stage["usable"]) == ("finetune", "chat", 64, 4)
    assert stage["images"]["problems"] == {"image missing": 1}


def test_check_of_a_recipe_checks_its_stages(captions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = {"path": str(captions), "images": {"": str(captions.parent / "pictures")}, "limit": 4, "weight": 1.5}
    recipe = {"name": "r", "method": "dpa", "data": {"captions": source, "instructions": source}}
    path = write_json(captions.parent / "recipe.yaml", recipe)  # JSON is YAML
    assert call("data", "check", path, "data.max_bad_share=1", "--json") == 0
    stages = json.loads(capsys.readouterr().out)["stages"]
    assert [(stage["stage"], stage["samples"]) for stage in stages] == [("proxy", 6), ("pretrain", 6), ("finetune", 6)]
    assert stages[0]["images"] is None
    assert call("data", "check", path, "method=vanilla", "data.max_bad_share=1", "--json") == 0
    assert [stage["stage"] for stage in json.loads(capsys.readouterr().out)["stages"]] == ["pretrain", "finetune"]


def test_convert_and_captions(captions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, text_only = captions.parent / "converted", captions.parent / "captions_text_only.json"
    assert call("data", "convert", captions, out, "--images", captions.parent / "pictures", "--copy", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["samples"], found["left_out"], found["images"]) == (4, 1, str(out))
    assert call("data", "captions", out / "data.jsonl", text_only) == 0
    assert "4 samples" in capsys.readouterr().out
    assert call("data", "check", text_only, "--json") == 0
    assert json.loads(capsys.readouterr().out)["stages"][0]["stage"] == "proxy"


def test_an_interrupt_says_how_to_go_on(
    captions: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dpa.pipeline.data_check.examine", interrupted)
    assert call("data", "check", captions) == 130
    assert "the same command continues" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("check", "gone.json"), "data file gone.json does not exist"),
        (("check", "CAPTIONS", "--format", "lava"), "format: "),
        (("check", "CAPTIONS", "--stage", "four"), "no such stage"),
        (("check", "CAPTIONS", "other.json"), "one source at a time"),
        (("check", "CAPTIONS", "--images", "gone"), "image folder gone"),
        (("check", "CAPTIONS", "--images", "a", "--images", "b"), "one prefix twice"),
        (("convert", "CAPTIONS", "CAPTIONS"), "captions.json is a file"),
        (("captions", "CAPTIONS", "out.jsonl"), "name the file .json"),
    ],
)
def test_wrong_input_is_one_message(
    captions: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    assert call("data", *(str(captions) if item == "CAPTIONS" else item for item in arguments)) in (1, 2)
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.out == ""
    assert "Traceback" not in printed.err
