"""Names of the reference for a run's results, and links that overwrite nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dpa.errors import UserError
from dpa.recipe import Recipe, dump_recipe
from dpa.results import link_results, reference_names
from dpa.store import link

DATA = {
    "captions": "data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json",
    "instructions": "data/Cambrian-10M/jsons/Cambrian737k.jsonl",
}


def recipe(**settings: Any) -> Recipe:
    model = {"llm": "meta-llama/Llama-3.1-8B-Instruct", "vision_tower": "openai/clip-vit-large-patch14-336"}
    return Recipe.model_validate({"name": "run", "data": DATA, "model": model, **settings})


def finished(root: Path, found: Recipe, key: str = "0123") -> Path:
    """A run's folder with a finished stage 1, as the pipeline leaves it."""
    artefact = root / "runs" / ".store" / f"proxy-{key}" / "proxy"
    artefact.mkdir(parents=True)
    (artefact / "adapter_config.json").write_text(key)
    run = root / "runs" / "run"
    run.mkdir(exist_ok=True)
    (run / "recipe.yaml").write_text(dump_recipe(found))
    link(artefact, run / "proxy")
    return run


def test_names_are_those_of_the_references_scripts() -> None:
    """The strings are what its three scripts print as run names (fnlp-vision/DPA, scripts/)."""
    llm = "Llama-3.1-8B-Instruct-pretrain-lora_r256_alpha512-blip558k"
    connector = f"llavanext-clip-vit-large-patch14-336-{llm}-pretrain-pma_mlp-blip558k"
    names = reference_names(recipe(), "dpa")
    assert {stage: str(name) for stage, name in names.items()} == {
        "proxy": f"llm/{llm}",
        "pretrain": f"projectors/{connector}",
        "finetune": f"finetune/{connector}-replaced_llm-finetune-dpa_mlp_lm-cambrian737k",
    }


def test_no_two_methods_share_a_name() -> None:
    stages = [reference_names(recipe(), method) for method in ("vanilla", "cal", "pmo", "cmo", "dpa")]
    for stage in ("pretrain", "finetune"):
        assert len({names[stage] for names in stages}) == 5
    assert "proxy" not in stages[0]
    assert stages[2]["proxy"] == stages[4]["proxy"]


def test_names_follow_adapter_folders_and_other_data() -> None:
    other = recipe(
        model={"llm": "/models/My-LLM/", "vision_tower": "lab:tower"},
        data={"captions": ["a/one.json", "b/two.v2.json"], "instructions": DATA["instructions"]},
        stages={"proxy": {"lora": {"rank": 8, "alpha": 16}}},
    )
    names = reference_names(other, "dpa")
    assert names["proxy"].name == "My-LLM-pretrain-lora_r8_alpha16-one+two"
    assert names["pretrain"].name.startswith("llavanext-lab-tower-My-LLM-")


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("data/pixmo-cap/data/*.parquet", "pixmo"),
        ("data/pixmo-cap/data", "pixmo"),
        ("mine/shards/*.parquet", "shards"),
        ("**/*.parquet", "data"),
    ],
)
def test_a_pattern_of_files_has_a_name_without_stars(path: str, name: str) -> None:
    other = recipe(data={"captions": path, "instructions": DATA["instructions"]})
    assert reference_names(other, "dpa")["proxy"].name == f"Llama-3.1-8B-Instruct-pretrain-lora_r256_alpha512-{name}"


def test_a_link_shows_the_result_and_moves_on_with_it(tmp_path: Path) -> None:
    found = recipe()
    run = finished(tmp_path, found)
    (first,) = link_results(run, tmp_path / "checkpoints")
    assert (first.place / "adapter_config.json").read_text() == "0123"
    assert not first.place.readlink().is_absolute()  # WORK_DIR can be moved as a whole
    finished(tmp_path, found, key="4567")
    (second,) = link_results(run, tmp_path / "checkpoints")
    assert second.place == first.place
    assert (second.place / "adapter_config.json").read_text() == "4567"


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_what_somebody_else_put_there_stays(tmp_path: Path, kind: str) -> None:
    found = recipe()
    run = finished(tmp_path, found)
    place = tmp_path / "checkpoints" / reference_names(found, "dpa")["proxy"]
    place.parent.mkdir(parents=True)
    (tmp_path / "theirs").mkdir()
    if kind == "folder":
        place.mkdir()
        (place / "adapter_model.bin").write_text("theirs")
    elif kind == "file":
        place.write_text("theirs")
    else:
        place.symlink_to(tmp_path / "theirs")
    before = sorted(map(str, (tmp_path / "checkpoints").rglob("*")))
    with pytest.raises(UserError, match="is there already"):
        link_results(run, tmp_path / "checkpoints")
    assert sorted(map(str, (tmp_path / "checkpoints").rglob("*"))) == before


def test_what_is_no_run_or_unfinished_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no recipe\.yaml"):
        link_results(tmp_path, tmp_path / "checkpoints")
    run = finished(tmp_path, recipe())
    (run / "proxy").unlink()
    with pytest.raises(UserError, match="no stage is finished"):
        link_results(run, tmp_path / "checkpoints")
