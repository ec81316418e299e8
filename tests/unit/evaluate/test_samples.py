"""What a report shows of the answers."""

from __future__ import annotations

import base64
import io
from pathlib import Path

from PIL import Image

from dpa.evaluate.lab import read_questions
from dpa.evaluate.samples import pick_samples
from dpa.evaluate.scores import Scored


def scores(folder: Path, prefix: str) -> list[Scored]:
    return [
        Scored(item.id, item.scene, item.kind, item.answer, f"{prefix} {item.id}", 0.0)
        for item in read_questions(folder)
    ]


def test_samples_with_every_methods_answer(lab_folder: Path) -> None:
    samples = pick_samples(lab_folder, {"dpa": scores(lab_folder, "d"), "vanilla": scores(lab_folder, "v")})
    assert len(samples) == 3
    by_id = {item.id: item for item in read_questions(lab_folder)}
    assert len({by_id[sample["id"]].scene for sample in samples}) == 3
    assert {sample["kind"] for sample in samples} == {"colour", "existence"}
    for sample in samples:
        question = by_id[sample["id"]]
        assert (sample["question"], sample["answer"]) == (question.question, question.answer)
        assert sample["answers"] == {"dpa": f"d {question.id}", "vanilla": f"v {question.id}"}
        with Image.open(io.BytesIO(base64.b64decode(sample["image"].partition(",")[2]))) as embedded:
            assert embedded.tobytes() == Image.open(question.image).tobytes()


def test_the_seed_decides_not_the_answers(lab_folder: Path) -> None:
    def ids(prefix: str, seed: int) -> list[str]:
        return [item["id"] for item in pick_samples(lab_folder, {"m": scores(lab_folder, prefix)}, count=2, seed=seed)]

    assert ids("good", 0) == ids("bad", 0)
    assert len({tuple(ids("x", seed)) for seed in range(8)}) > 2


def test_only_questions_that_all_methods_answered(lab_folder: Path) -> None:
    few = scores(lab_folder, "v")[:1]
    samples = pick_samples(lab_folder, {"dpa": scores(lab_folder, "d"), "vanilla": few})
    assert [sample["id"] for sample in samples] == ["q0"]
