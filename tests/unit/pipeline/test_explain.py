"""Samples of a run: its recipe's data, the models of its stages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dpa.analyze.explain import Explanation
from dpa.errors import DataError, UserError
from dpa.models.vlm import build_vlm
from dpa.pipeline import run
from dpa.pipeline.explain import explain_samples, explain_text, headline
from dpa.pipeline.models import open_model, run_of, stage_named
from dpa.recipe import load_recipe
from dpa.testing.project import write_project


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of dpa and vanilla, two steps a stage; every caption says that its first word is visual."""
    path = write_project(tmp_path_factory.mktemp("run") / "project")
    captions = path.parent / "captions.json"
    rows: list[dict[str, Any]] = json.loads(captions.read_text(encoding="utf-8"))
    for row in rows:
        text = row["conversations"][-1]["value"]
        row["visual_spans"] = [[0, len(text.split()[0])]]
    captions.write_text(json.dumps(rows), encoding="utf-8")
    stages = {f"stages.{name}.max_steps": 2 for name in ("proxy", "pretrain", "finetune")}
    run(load_recipe(path, {**stages, "stages.pretrain.minimum": 0.1, "stages.pretrain.window": 1}))
    return path.parent / "runs" / "project"


def numbers(explanation: Explanation) -> list[float]:
    return [token.logp_with for token in explanation.tokens]


def test_samples_are_drawn_and_weighed_as_the_stage_did(finished: Path) -> None:
    rows = explain_samples([str(finished), str(finished / "vanilla")], samples=3)
    assert len(rows) == 3
    assert len({row[0].sample for row in rows}) == 3
    for dpa, vanilla in rows:
        assert (dpa.checkpoint, vanilla.checkpoint) == ("project/dpa, pretrain", "project/vanilla, pretrain")
        assert dpa.sample == vanilla.sample
        assert "captions.json, record" in dpa.sample
        assert (dpa.rule.kind, dpa.rule.minimum, dpa.rule.maximum, dpa.rule.window) == ("cmo", 0.1, 0.5, 1)
        assert dpa.image_mode == "crop"
        assert any(token.visual for token in dpa.tokens)
        assert numbers(dpa) != numbers(vanilla)
    again, other = (explain_samples([str(finished)], samples=3, seed=seed) for seed in (0, 1))
    assert [row[0] for row in rows] == [row[0] for row in again]
    assert [row[0].sample for row in rows] != [row[0].sample for row in other]
    text = "\n".join(headline(rows[0]))
    assert "project/dpa, pretrain" in text
    assert "ROC-AUC" in text


def test_stage_three_has_conversations_with_images_only(finished: Path) -> None:
    rows = explain_samples([str(finished)], samples=99, stage="finetune", kind="cal")
    assert len(rows) == 8  # of ten, every fourth has no image
    assert all(row[0].pictures and row[0].image_mode == "pad" for row in rows)
    assert rows[0][0].prompts[1] == "sure?"
    assert {token.segment for token in rows[0][0].tokens} == {0, 1}
    assert (rows[0][0].rule.minimum, rows[0][0].rule.maximum) == (1.0, 5.0)


def test_the_model_of_stage_two_has_the_proxy_in_it(finished: Path) -> None:
    found = run_of(str(finished))
    assert found is not None
    vlm, name = open_model(str(finished), stage="pretrain")
    assert name == "project/dpa, pretrain"
    own = build_vlm(found.recipe.model, adapter=finished / "proxy", connector=finished / "connector/mm_projector.bin")
    mine, theirs = vlm.model.state_dict(), own.model.state_dict()
    assert all(mine[name].equal(tensor) for name, tensor in theirs.items())
    with pytest.raises(UserError, match="already"):
        open_model(str(finished), stage="pretrain", proxy=finished / "proxy")
    _, name = open_model(str(finished / "vanilla"), proxy=finished / "proxy")
    assert name == "project/vanilla + proxy"


def test_a_text_and_its_truth(finished: Path) -> None:
    project = finished.parents[1]
    image = project / "images" / "deep" / "0 picture.jpg"
    truth = project / "captions.json"
    (found,) = explain_text([str(finished)], image, "a small red circle.", truth=truth)
    assert [token.visual for token in found.tokens].count(True) >= 1
    with pytest.raises(DataError, match="no record with visual_spans"):
        explain_text([str(finished)], image, "something else", truth=truth)


def test_the_users_mistakes(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run's folder"):
        explain_samples([str(finished / "checkpoint")], samples=1)
    with pytest.raises(UserError, match="stage 1 has no images"):
        stage_named("proxy")
    (tmp_path / "recipe.yaml").write_text((finished / "recipe.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    with pytest.raises(UserError, match="not finished"):
        open_model(str(tmp_path))
    assert run_of(str(finished / "checkpoint")) is None
