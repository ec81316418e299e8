"""The two examples for other toolkits, without the toolkits."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

from dpa.evaluate.data.read import read_benchmark
from dpa.evaluate.generate import Question, generate_answers
from dpa.evaluate.load import load_model, open_processor
from dpa.testing.benchmarks import write_benchmarks
from tests.unit.evaluate.conftest import write_pictures

EXAMPLES = Path(__file__).parents[4] / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_vlmevalkits_class_answers_as_we_do(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("vlmeval", "vlmeval.vlm", "vlmeval.vlm.base"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setattr(sys.modules["vlmeval.vlm.base"], "BaseModel", object, raising=False)
    model = example("vlmevalkit_model").DpaCheckpoint(str(checkpoint), max_new_tokens=5)
    (picture,) = write_pictures(tmp_path, 1)
    Image.open(picture).convert("L").save(tmp_path / "grey.png")
    questions = [
        Question(id="one", text="what is it?", images=(picture,)),
        Question(id="text", text="two and two?"),
        Question(id="two", text="which?", images=(picture, picture)),
    ]
    stock = load_model(str(checkpoint), "cpu")
    expected = generate_answers(stock, open_processor(str(checkpoint)), questions, batch_size=1, max_new_tokens=5)
    assert len({answer.prediction for answer in expected}) == 3
    for question, answer in zip(questions, expected, strict=True):
        images = [{"type": "image", "value": str(path)} for path in question.images]
        assert model.generate_inner([*images, {"type": "text", "value": question.text}]) == answer.prediction


def test_cambrians_answer_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = example("cambrian_answers")
    data = write_benchmarks(tmp_path / "data")
    monkeypatch.setattr(module, "read_benchmark", lambda name, folder: read_benchmark(name, folder, limit=100))
    predictions = tmp_path / "checkpoint.eval"
    predictions.mkdir()
    for name in ("mmvp", "cvbench"):
        lines = [
            json.dumps({"id": task.id, "prediction": f"say {task.id}"}) + "\n"
            for task in read_benchmark(name, data, limit=100)
        ]
        (predictions / f"{name}.jsonl").write_text("".join(reversed(lines)))  # as generation leaves them: in no order
    module.write_answers(data, predictions, tmp_path / "out")
    written = {
        path.stem: [json.loads(line) for line in path.read_text().splitlines()]
        for path in (tmp_path / "out").glob("*.jsonl")
    }
    assert {name: len(rows) for name, rows in written.items()} == {"mmvp": 12, "ade": 2, "coco": 4, "omni": 6}
    assert [row["question_id"] for row in written["mmvp"]] == [str(number) for number in range(1, 13)]
    assert [row["gt_answer"] for row in written["mmvp"]] == ["(a)", "(b)"] * 6
    assert written["mmvp"][0]["text_options"] == ["Open", "Closed"]
    assert all(row["answer"] == f"say {row['question_id']}" for rows in written.values() for row in rows)
    assert {row["category"] for row in written["omni"]} == {"Depth"}
