"""The file of an ablation and its cells."""

from __future__ import annotations

from pathlib import Path

import pytest

from dpa.ablation.grid import cells_of, load_ablation, shard_of
from dpa.errors import RecipeError
from dpa.recipe import load_recipe
from dpa.testing.project import write_project

FILE = """
name: grid
base: recipe.yaml
methods: {vanilla: {}, dpa: {}, ours: {method: dpa, stages.pretrain.objective: prior}}
seeds: [3, 5]
axes:
  delta:
    low: {stages.pretrain.maximum: 0.25}
    high: {stages.pretrain.maximum: 0.5}
  answers: {few: {stages.finetune.max_steps: 1}, many: {stages.finetune.max_steps: 2}}
exclude: [{delta: high, method: ours}]
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = write_project(tmp_path_factory.mktemp("grid") / "project")
    (recipe.parent / "grid.yaml").write_text(FILE)
    return recipe.parent


def test_cells(project: Path) -> None:
    ablation = load_ablation(project / "grid.yaml", ["train.threads=2", f"output={project / 'out'}"])
    cells = cells_of(ablation)
    assert len(cells) == 2 * 2 * 2 * 3 - 4  # two points and two seeds without "ours"
    assert not [cell for cell in cells if cell.method == "ours" and dict(cell.point)["delta"] == "high"]
    ours = next(cell for cell in cells if cell.method == "ours")
    assert ours.recipe.methods == ("dpa",)
    assert ours.recipe.objective("dpa", "pretrain") == "prior"
    assert {cell.recipe.train.threads for cell in cells} == {2}
    assert {cell.recipe.seed for cell in cells} == {3, 5}
    assert len({cell.folder for cell in cells}) == len(cells)
    assert {cell.recipe.store for cell in cells} == {project / "out" / ".store"}
    few = [cell for cell in cells if dict(cell.point)["answers"] == "few"]
    assert {cell.recipe.stages.finetune.max_steps for cell in few} == {1}


def test_shards_are_whole_groups_and_the_whole(project: Path) -> None:
    cells = cells_of(load_ablation(project / "grid.yaml"))
    # what differs in stage 3 alone shares stage 2
    assert len({cell.group for cell in cells}) == 2 * 2
    parts = [shard_of(cells, f"{part}/3") for part in (1, 2, 3)]
    assert sorted(cell.title for part in parts for cell in part) == sorted(cell.title for cell in cells)
    assert not {cell.group for cell in parts[0]} & {cell.group for cell in parts[1]}
    for wrong in ("0/2", "3/2", "1", "a/b"):
        with pytest.raises(RecipeError, match="expected i/n"):
            shard_of(cells, wrong)


def test_set_on_the_command_line_takes_the_place_of_the_files(project: Path) -> None:
    given = ["stages.pretrain.max_steps=9", "set={stages.proxy.max_steps: 7}"]
    for cell in cells_of(load_ablation(project / "grid.yaml", given)):
        assert (cell.recipe.stages.proxy.max_steps, cell.recipe.stages.pretrain.max_steps) == (7, 9)


def test_a_recipe_alone(project: Path) -> None:
    ablation = load_ablation(project / "recipe.yaml", seeds=[1])
    assert [cell.title for cell in cells_of(ablation)] == ["dpa, seed 1", "vanilla, seed 1"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("methods=[vanila]", "'vanila' is no method; did you mean vanilla"),
        ("methods=[]", "name at least one method"),
        ("seeds=[]", "name at least one seed"),
        ("nme=x", "cell .*unknown key nme"),
        ("set={train: {yes: 1}}", "cell .*unknown key train.True"),
        ("set={train: {1: {2: 3}}}", "cell .*unknown key train.1"),
        ("stages.pretrain.learning_rat=1", "learning_rate"),
    ],
)
def test_wrong_files(project: Path, change: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        cells_of(load_ablation(project / "grid.yaml", [change]))


def test_null_leaves_out(project: Path) -> None:
    (project / "less.yaml").write_text(
        "extends: grid.yaml\nname: less\nexclude: []\n"
        "methods: {ours: null}\naxes: {answers: null, delta: {high: null}}\n"
    )
    cells = cells_of(load_ablation(project / "less.yaml"))
    assert {cell.title for cell in cells} == {
        f"delta low, {method}, seed {seed}" for method in ("vanilla", "dpa") for seed in (3, 5)
    }


def test_an_unknown_key_of_the_file(project: Path) -> None:
    (project / "wrong.yaml").write_text(FILE.replace("seeds:", "seds:"))
    with pytest.raises(RecipeError, match="unknown key seds; did you mean seeds"):
        load_ablation(project / "wrong.yaml")


def test_nothing_is_left_out_by_accident(project: Path) -> None:
    (project / "bare.yaml").write_text(FILE.replace("{vanilla: {}, dpa: {}", "{vanilla: , dpa: {}"))
    with pytest.raises(RecipeError, match=r"methods\.vanilla is empty; write vanilla: \{\}"):
        load_ablation(project / "bare.yaml")
    (project / "bare.yaml").write_text(FILE.replace("few: {stages.finetune.max_steps: 1}", "few: "))
    with pytest.raises(RecipeError, match=r"axes\.answers\.few is empty"):
        load_ablation(project / "bare.yaml")


def test_null_is_a_value_of_a_setting(project: Path) -> None:
    (project / "null.yaml").write_text(
        "name: nulls\nbase: recipe.yaml\nmethods: {dpa: {}, long: {method: dpa, stages.finetune.max_steps: null}}\n"
        "seeds: [0]\nset: {stages.pretrain.max_steps: null, stages.finetune.max_steps: 3}\n"
    )
    cells = {cell.method: cell.recipe.stages for cell in cells_of(load_ablation(project / "null.yaml"))}
    assert cells["dpa"].pretrain.max_steps is None, "the recipe's own number is taken away"
    assert (cells["dpa"].finetune.max_steps, cells["long"].finetune.max_steps) == (3, None)


def test_a_nested_group_replaces_no_other_setting(project: Path) -> None:
    (project / "nested.yaml").write_text(
        "name: nested\nbase: recipe.yaml\nmethods: {dpa: {stages: {proxy: {lora: {rank: 3}}}}}\nseeds: [0]\n"
        "axes: {steps: {few: {stages: {pretrain: {max_steps: 1}}}}}\nset: {stages: {finetune: {max_steps: 1}}}\n"
    )
    (nested,) = cells_of(load_ablation(project / "nested.yaml"))
    keys = ["stages.proxy.lora.rank=3", "stages.pretrain.max_steps=1", "stages.finetune.max_steps=1"]
    assert nested.recipe.stages == load_recipe(project / "recipe.yaml", keys).stages


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("axes:", "baseline: vanila\naxes:", "baseline: 'vanila' is none of the methods; did you mean vanilla"),
        ("{delta: high,", "{deltas: high,", "there is no axis 'deltas'; there are delta, answers, method"),
        ("ours:", "../ours:", "'../ours': folders and columns are named after it"),
        ("low:", "0/1:", "'0/1': folders"),
        ("  delta:", "  seed:", "an axis cannot be called seed"),
        ("exclude:", "set: [train.threads, 1]\nexclude:", "set: a mapping of dotted keys"),
    ],
)
def test_odd_names(project: Path, old: str, new: str, message: str) -> None:
    (project / "odd.yaml").write_text(FILE.replace(old, new, 1))
    with pytest.raises(RecipeError, match=message):
        load_ablation(project / "odd.yaml")


def test_a_shard_has_work(project: Path) -> None:
    with pytest.raises(RecipeError, match=r"5/5: .* 4 groups"):
        shard_of(cells_of(load_ablation(project / "grid.yaml")), "5/5")


RECIPES = Path(__file__).parents[3] / "recipes" / "lab"


@pytest.mark.parametrize(
    ("name", "runs"),
    [
        ("study", 3 * 5 * 7),
        ("study-small", 5 * 7 + 5 * 5),
        ("ablations/components", 2 * 4 * 5),
        ("ablations/cmo-stages", 2 * 4 * 5),
        ("ablations/instructions", 3 * 3 * (4 + 2)),
        ("ablations/lora-rank", 4 * 2 * 2),
        ("ablations/delta", 4 * 2 * 2),
        ("ablations/data-scale", 3 * 2 * 3),
    ],
)
def test_shipped_files(name: str, runs: int) -> None:
    cells = cells_of(load_ablation(RECIPES / f"{name}.yaml"))
    assert len(cells) == runs
    assert len({cell.folder for cell in cells}) == runs
    assert all(cell.recipe.evaluate.benchmarks == ("lab",) for cell in cells)
