"""Recipes: strict, with messages that name the place and the mend."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dpa.errors import RecipeError
from dpa.recipe import METHODS, dump_recipe, load_recipe

BASE = "name: x\ndata: {captions: a.json, instructions: [b.json]}\nstages: {pretrain: {learning_rate: 2e-3}}\n"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.yaml"
    path.write_text(BASE)
    return path


def test_the_papers_settings_are_the_defaults(base: Path) -> None:
    stages = load_recipe(base).stages
    assert (stages.proxy.lora.rank, stages.proxy.lora.alpha, stages.proxy.lora.dropout) == (256, 512, 0)
    assert (stages.proxy.learning_rate, stages.pretrain.learning_rate, stages.finetune.learning_rate) == (
        4e-5,
        2e-3,
        4e-5,
    )
    assert (stages.proxy.micro_batch, stages.pretrain.micro_batch, stages.finetune.micro_batch) == (16, 32, 8)
    assert (stages.proxy.max_length, stages.pretrain.max_length, stages.finetune.max_length) == (8192, 8192, 2048)
    for stage in (stages.proxy, stages.pretrain, stages.finetune):
        assert (stage.global_batch, stage.epochs, stage.weight_decay, stage.warmup_ratio) == (256, 1, 0, 0.03)
    assert (stages.pretrain.image_mode, stages.finetune.image_mode) == ("crop", "pad")
    assert (stages.proxy.format, stages.pretrain.format, stages.finetune.format) == ("plain", "plain", "chat")


def test_the_methods_are_points_of_one_space(base: Path) -> None:
    points = {name: (m.proxy, m.pretrain, m.finetune) for name, m in METHODS.items()}
    assert points == {
        "vanilla": (False, "uniform", "uniform"),
        "cal": (False, "cal", "cal"),
        "pmo": (True, "uniform", "uniform"),
        "cmo": (False, "cmo", "cmo"),
        "dpa": (True, "cmo", "cmo"),
        "dpa-prior": (True, "prior", "uniform"),
    }
    recipe = load_recipe(base, ["stages.finetune.objective=uniform"])
    assert recipe.objective("dpa", "pretrain") == "cmo"
    assert recipe.objective("dpa", "finetune") == "uniform"  # the ablation "CMO in pretraining alone"
    assert recipe.objective("cal", "proxy") == "uniform"


def test_resolved_recipe_loads_again(base: Path, tmp_path: Path) -> None:
    recipe = load_recipe(base, ["methods=[dpa, vanilla]", "data.captions.limit=5", "stages.proxy.lora.rank=8"])
    (tmp_path / "resolved.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(tmp_path / "resolved.yaml") == recipe
    assert recipe.data.captions[0].limit == 5
    assert recipe.data.captions[0].path == Path("a.json")


def test_extends_merges_and_the_child_wins(base: Path, tmp_path: Path) -> None:
    child = tmp_path / "child.yaml"
    child.write_text("extends: base.yaml\nname: y\nmethod: cal\nstages: {pretrain: {epochs: 2}}\n")
    recipe = load_recipe(child)
    assert (recipe.name, recipe.methods) == ("y", ("cal",))
    assert (recipe.stages.pretrain.learning_rate, recipe.stages.pretrain.epochs) == (2e-3, 2)
    base.write_text(BASE + "extends: child.yaml\n")
    with pytest.raises(RecipeError, match="extends itself"):
        load_recipe(child)


@pytest.mark.parametrize("value", ["2e-3", "1e3", "0.002", "2E-3"])
def test_numbers_with_exponents_are_numbers(base: Path, value: str) -> None:
    assert load_recipe(base, [f"stages.pretrain.learning_rate={value}"]).stages.pretrain.learning_rate == float(value)


def test_method_overrides_methods_and_back(base: Path) -> None:
    assert load_recipe(base, ["methods=[dpa, cal]", "method=vanilla"]).methods == ("vanilla",)
    assert load_recipe(base, {"method": "vanilla", "seed": 3}).seed == 3


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.pretrain.learning_rat=1", r"unknown key stages.pretrain.learning_rat; did you mean learning_rate\?"),
        ("stages.proxy.lora.rnk=1", r"unknown key stages.proxy.lora.rnk; did you mean rank\?"),
        ("model.lln=x", r"unknown key model.lln; did you mean llm\?"),
        ("data.captions.imags=x", r"unknown key data.captions.0.imags; did you mean images\?"),
        ("zzz=1", "unknown key zzz; known: name, methods"),
        ("method=dpaa", "'vanilla', 'cal', 'pmo', 'cmo', 'dpa' or 'dpa-prior'"),
        ("methods=[dpa, dpa]", "names one method twice"),
        ("seed=-1", "greater than or equal to 0"),
        ("name=../x", "name"),
        ("stages.proxy.objective=cmo", "stage 1 sees no image"),
        ("stages.proxy.format=chat", "format must be plain"),
        ("evaluate.benchmarks=[lab]", "needs evaluate.data"),
        ("seed", "has the form key=value"),
        ("seed.x=1", "seed"),
        ("extends=x", "cannot be overridden"),
        ("seed=[", "not valid YAML"),
    ],
)
def test_wrong_settings_say_where_and_what(base: Path, override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(base, [override])


def test_wrong_files(tmp_path: Path, base: Path) -> None:
    with pytest.raises(RecipeError, match=r"no such recipe; did you mean .*base.yaml"):
        load_recipe(tmp_path / "bas.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(RecipeError, match="a recipe is a mapping"):
        load_recipe(tmp_path / "list.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(tmp_path / "binary.yaml")
    (tmp_path / "empty.yaml").write_text("name: x\n")
    with pytest.raises(RecipeError, match="data is missing"):
        load_recipe(tmp_path / "empty.yaml")


def test_recipes_need_no_torch() -> None:
    code = "import sys, dpa.recipe; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_override_reaches_one_of_two_aliases(base: Path, tmp_path: Path) -> None:
    path = tmp_path / "aliased.yaml"
    path.write_text(f"extends: {base}\nstages: {{pretrain: &same {{max_steps: 3}}, finetune: *same}}\n")
    stages = load_recipe(path, ["stages.finetune.max_steps=5"]).stages
    assert (stages.pretrain.max_steps, stages.finetune.max_steps) == (3, 5)


def test_compiled_layers_do_not_call_the_hooks_of_official_fidelity(base: Path) -> None:
    assert load_recipe(base, ["train.compile=true"]).train.compile
    with pytest.raises(RecipeError, match=r"train\.compile is not for fidelity official"):
        load_recipe(base, ["train.compile=true", "fidelity=official"])
