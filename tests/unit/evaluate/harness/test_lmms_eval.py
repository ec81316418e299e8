"""lmms-eval itself, in its own process, on our generation: runs where the extra is installed (make test-lmms)."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from dpa.errors import UserError
from dpa.evaluate.generate import Question, generate_answers
from dpa.evaluate.harness.run import evaluate_with_lmms_eval
from dpa.evaluate.load import load_model, open_processor
from tests.unit.evaluate.harness.conftest import picture, write_table

pytest.importorskip("lmms_eval", reason="the extra dpa[lmms] is not installed", exc_type=ImportError)

TASK = """\
task: colours
dataset_path: parquet
dataset_kwargs: {data_files: {test: test.parquet}}
test_split: test
output_type: generate_until
doc_to_visual: !function visual.pictures
doc_to_text: "What is it? {{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {max_new_tokens: 6, until: ["\\n\\n"]}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""
ROWS = 8


@pytest.fixture(scope="module")
def expected(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Question -> what the checkpoint answers, without any harness."""
    folder = tmp_path_factory.mktemp("pictures")
    questions = []
    for number in range(ROWS):
        path = folder / f"{number}.png"
        Image.open(io.BytesIO(picture(number)["bytes"])).save(path)
        questions.append(Question(id=f"thing {number}", text=f"What is it? thing {number}", images=(path,)))
    model = load_model(str(checkpoint), "cpu")
    answers = generate_answers(model, open_processor(str(checkpoint)), questions, batch_size=3, max_new_tokens=6)
    assert len({answer.prediction for answer in answers}) > 2, "else a mix-up of the rows would not be seen"
    return {answer.id: answer.prediction for answer in answers}


@pytest.fixture
def data(tmp_path: Path, expected: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A task of our own, of whose answers the checkpoint gets the first three right, and a local AI2D."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.delenv("HF_DATASETS_CACHE", raising=False)
    folder = tmp_path / "data"
    write_table(
        folder / "colours" / "test.parquet",
        [
            {"question": question, "answer": answer if number < 3 else "never said", "image": picture(number)}
            for number, (question, answer) in enumerate(expected.items())
        ],
    )
    (folder / "colours" / "colours.yaml").write_text(TASK)
    (folder / "colours" / "visual.py").write_text("def pictures(doc):\n    return [doc['image'].convert('RGB')]\n")
    write_table(
        folder / "ai2d" / "data" / "test-00000-of-00001.parquet",
        [
            {"question": f"which {number}?", "options": ["leaf", "root"], "answer": "1", "image": picture(number)}
            for number in range(5)
        ],
    )
    return folder


def test_our_answers_lmms_evals_scores(checkpoint: Path, data: Path, expected: dict[str, str], tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []

    def progress(benchmark: str) -> Callable[[int, int], None]:
        return lambda done, total: seen.append((benchmark, done, total))

    def run() -> dict[str, object]:
        return evaluate_with_lmms_eval(
            str(checkpoint),
            benchmarks=["ai2d", "colours"],
            data=data,
            out=tmp_path / "out",
            batch_size=3,
            progress=progress,
        ).to_dict()

    result = run()
    assert result["harness"] == "lmms-eval 0.7.3"
    benchmarks = result["benchmarks"]
    assert isinstance(benchmarks, dict)
    (own,) = benchmarks["colours"]
    assert (own["name"], own["value"], own["n"]) == ("exact_match", 3 / ROWS, ROWS)
    (ai2d,) = benchmarks["ai2d"]
    assert (ai2d["task"], ai2d["name"], ai2d["filter"], ai2d["n"]) == ("ai2d", "exact_match", "flexible-extract", 5)
    records = [json.loads(line) for line in (tmp_path / "out" / "colours.samples.jsonl").read_text().splitlines()]
    said = {record["doc"]["question"]: record["filtered_resps"][0] for record in records}
    assert said == expected
    assert seen[0] == ("ai2d", 0, 5)
    assert seen[-1] == ("colours", ROWS, ROWS)

    lines = (tmp_path / "out" / "colours.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "out" / "colours.jsonl").write_text("".join(lines[:5]))  # as after a kill
    seen.clear()
    assert run() == result
    assert seen[0] == ("ai2d", 5, 5)
    assert ("colours", 5, ROWS) in seen
    assert ("colours", 0, ROWS) not in seen


def test_a_task_that_it_does_not_have(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"lmms-eval has no task 'docvqa_vel'; there is .*docvqa_val"):
        evaluate_with_lmms_eval(str(checkpoint), benchmarks=["docvqa_vel"], data=None, out=tmp_path / "out")
