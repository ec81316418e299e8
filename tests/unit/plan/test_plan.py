"""dpa plan: counts against real models, dealing against training's own, what is in the way."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dpa.errors import ModelError, UserError
from dpa.models.lora import attach_lora
from dpa.models.parts import load_llm
from dpa.models.settings import LoraSettings, ModelSettings
from dpa.models.vlm import build_vlm
from dpa.pipeline import dry_run
from dpa.pipeline.inputs import Inputs, store_of
from dpa.plan.calibrate import calibrate
from dpa.plan.count import Load, flops, peak_bytes
from dpa.plan.machine import Machine, machine_of
from dpa.plan.plan import RunPlan, make_plan, sizes_of
from dpa.plan.shapes import read_parts
from dpa.plan.text import plan_text
from dpa.plan.workload import Samples, counted, workload
from dpa.recipe import MethodName, Recipe, load_recipe
from dpa.testing.parts import write_tiny_llm, write_tiny_tower
from dpa.testing.project import write_project
from dpa.train.settings import StageSettings

PAPER = Path(__file__).parents[3] / "recipes" / "paper"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return load_recipe(write_project(tmp_path_factory.mktemp("plan") / "project"))


def of_7b(*overrides: str, gpu: str = "h100") -> RunPlan:
    loaded = load_recipe(PAPER / "qwen2.5-7b" / "blip558k.yaml", overrides)
    return make_plan(loaded, machine_of(loaded, gpu, None, None))


@pytest.mark.parametrize("family", ["qwen2", "llama3", "gemma2"])
def test_parameters_are_those_of_the_real_model(tmp_path: Path, family: str) -> None:
    llm = write_tiny_llm(tmp_path / "llm", family)  # type: ignore[arg-type]
    tower = write_tiny_tower(tmp_path / "tower", "clip")
    settings = ModelSettings(llm=str(llm), vision_tower=str(tower))
    parts = read_parts(settings, lora_rank=3)
    vlm = build_vlm(settings, dtype=torch.float32, seed=0)
    model = vlm.model
    own = sum(parameter.numel() for parameter in load_llm(settings, dtype=torch.float32).parameters())
    assert parts.llm_parameters == own
    assert parts.tower_parameters == sum(p.numel() for p in model.model.vision_tower.parameters())
    assert parts.connector_parameters == sum(p.numel() for p in model.model.multi_modal_projector.parameters())
    lora = attach_lora(load_llm(settings, dtype=torch.float32), LoraSettings(rank=3, alpha=6), seed=0)
    assert parts.lora_parameters == sum(p.numel() for p in lora.parameters() if p.requires_grad)
    layer = model.model.language_model.layers[0]
    assert parts.llm.layer == sum(p.numel() for p in layer.parameters() if p.ndim == 2)


def test_the_table_knows_the_papers_models() -> None:
    """Parameters as the models' cards state them."""
    known = {
        "Qwen/Qwen2.5-7B-Instruct": 7.62e9,
        "meta-llama/Llama-3.1-8B-Instruct": 8.03e9,
        "google/gemma-2-9b-it": 9.24e9,
    }
    for name, parameters in known.items():
        settings = ModelSettings(llm=name, vision_tower="openai/clip-vit-large-patch14-336")
        parts = read_parts(settings, lora_rank=1)
        assert parts.llm_parameters == pytest.approx(parameters, rel=0.002)
        assert parts.tower_parameters == pytest.approx(304e6, rel=0.005)
        assert parts.tower.image_tokens == 576


def test_an_unknown_model_is_refused_with_what_to_do() -> None:
    with pytest.raises(ModelError, match="hf download nobody/nothing"):
        read_parts(ModelSettings(llm="nobody/nothing", vision_tower="lab:tower"), lora_rank=1)


def test_steps_and_samples_are_training_s_own(recipe: Recipe) -> None:
    plan = make_plan(recipe, machine_of(recipe, "h100", None, None))
    steps = {row["stage"]: (row["steps"], row["samples"], row["state"]) for row in dry_run(recipe).rows}
    assert {stage.stage: (stage.steps, stage.samples, stage.state) for stage in plan.stages} == steps
    assert all(stage.counted for stage in plan.stages)
    assert plan.can_run, plan.problems
    # dpa and vanilla share nothing but the data: one stage 1, two stages 2 and 3
    assert [(stage.stage, stage.methods) for stage in plan.stages] == [
        ("proxy", ("dpa",)),
        ("pretrain", ("dpa",)),
        ("pretrain", ("vanilla",)),
        ("finetune", ("dpa",)),
        ("finetune", ("vanilla",)),
    ]


def test_loads_add_up() -> None:
    samples = Samples(np.array([5, 7, 9, 3]), np.array([1, 1, 1, 0]), np.array([5, 7, 9, 3]), 3, counted=True)
    settings = StageSettings(learning_rate=1, global_batch=4, micro_batch=4)
    work = workload(samples, settings, image_tokens=10, ranks=1, packing=False, seed=0)
    assert (work.steps, work.micro_batches, work.samples_seen) == (1, 2, 4)
    assert work.peak.positions == 3 * 19  # padded to the longest
    assert (work.peak.images, work.peak.text, work.peak.supervised) == (3, 21, 21)
    assert work.tokens == 24 + 30


def test_a_sample_with_several_images(tmp_path: Path) -> None:
    """Its images are read, encoded and trained through one by one."""
    path = write_project(tmp_path / "project")
    rows = [json.loads(line) for line in (path.parent / "instructions.jsonl").read_text().splitlines()]
    shown = [row["image"] for row in rows if "image" in row]
    rows[0] |= {"image": shown[:3]}
    rows[0]["conversations"][0]["value"] = "<image> <image> <image> which?"
    (path.parent / "instructions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = load_recipe(path, ["methods=[vanilla]", "stages.finetune.max_steps=null", "train.vision_cache=true"])
    data = Inputs(recipe, store_of(recipe)).stage("finetune")
    parts = read_parts(recipe.model, lora_rank=1)
    samples = counted(data.audit, parts.image_tokens)
    encoded = [data.data.text_item(place).encoded for place in range(len(data.data))]
    assert samples.images.tolist() == [len(item.image_spans) for item in encoded]
    assert samples.text.tolist() == [
        len(item.input_ids) - parts.image_tokens * len(item.image_spans) for item in encoded
    ]
    assert 3 in samples.images
    plan = make_plan(recipe, machine_of(recipe, "h100", None, None))
    stage = next(stage for stage in plan.stages if stage.stage == "finetune")
    assert (stage.images, stage.different_images) == (len(shown) + 2, len(shown))
    assert stage.labels == sum(sum(item.supervised) for item in encoded)
    assert plan.disk["vision cache, finetune"] == 2.0 * len(shown) * parts.image_tokens * parts.tower.hidden


def test_an_objective_without_a_second_pass_costs_what_vanilla_costs() -> None:
    stages = [of_7b("method=pmo", f"stages.pretrain.objective={name}").stages for name in ("spans", "uniform")]
    spans, uniform = (next(stage for stage in found if stage.stage == "pretrain") for found in stages)
    assert spans.objective == "spans"
    assert spans.flops == uniform.flops


def test_checkpointing_and_sharding_need_less(recipe: Recipe) -> None:
    plan = of_7b()
    sizes = sizes_of(plan.parts, recipe)
    load = Load(8, 8 * 900, 8 * 324, 1600, 8 * 900**2, 8 * 324**2, 900)
    base = peak_bytes(sizes, "finetune", "ours", load, checkpointing=True)
    assert base["total"] < peak_bytes(sizes, "finetune", "ours", load, checkpointing=False)["total"]
    frozen = peak_bytes(sizes, "pretrain", "ours", load, checkpointing=True)
    assert frozen == peak_bytes(sizes, "pretrain", "ours", load, checkpointing=True, parallel="fsdp", ranks=8)
    for parallel in ("zero2", "zero3", "fsdp"):
        shared = peak_bytes(sizes, "finetune", "ours", load, checkpointing=True, parallel=parallel, ranks=8)  # type: ignore[arg-type]
        assert shared["total"] < base["total"]
        assert shared["optimizer"] == base["optimizer"] / 8
    zero2, zero3 = (
        peak_bytes(sizes, "finetune", "ours", load, checkpointing=True, parallel=parallel, ranks=8)["total"]
        for parallel in ("zero2", "zero3")  # type: ignore[arg-type]
    )
    layers = 28 * sizes.llm.layer * 2.0
    assert zero2 - zero3 == pytest.approx(layers * 26 / 28), "all layers are whole in bfloat16 within a step, not two"
    more = flops(sizes, "finetune", "ours", load, checkpointing=True)["total"]
    assert more > flops(sizes, "finetune", "ours", load, checkpointing=False)["total"]


def test_what_does_not_fit_says_what_does() -> None:
    alone = of_7b()
    assert not alone.can_run
    assert any("stage finetune needs" in str(problem) and "parallel=fsdp" in problem.fix for problem in alone.problems)
    eight = of_7b("gpus=8")
    fix = next(problem.fix for problem in eight.problems if problem.what.startswith("stage finetune needs"))
    settings = [word for word in fix.removeprefix("use ").split() if "=" in word]
    assert "parallel=fsdp" in settings
    mended = of_7b("gpus=8", *settings)
    assert all(stage.fits for stage in mended.stages)
    small = of_7b("gpus=8", "parallel=fsdp", gpu="rtx4090")
    assert any("stage finetune" in str(problem) for problem in small.problems if problem.level == "error")


def test_the_reference_of_stage_3_takes_room() -> None:
    """Objective prior: a second, frozen LLM beside the trained one; in stage 2 the model's own is frozen."""
    plain, prior = (of_7b("gpus=8", "parallel=zero2", f"stages.finetune.objective={name}") for name in ("cmo", "prior"))
    of = [next(stage.memory for stage in plan.stages if stage.stage == "finetune") for plan in (plain, prior)]
    assert of[1]["total"] - of[0]["total"] == of[1]["reference"] == 2.0 * prior.parts.llm_parameters
    assert "reference" in plan_text(prior)
    assert all("reference" not in stage.memory for stage in of_7b("method=dpa-prior").stages)


def test_what_the_run_would_refuse_on_its_ranks_is_in_the_way(recipe: Recipe) -> None:
    asked = recipe.evaluate.model_copy(update={"every_steps": 2})
    for parallel, gpus, told in (("zero2", 2, True), ("zero2", 1, False), ("ddp", 2, False)):
        given = recipe.model_copy(update={"parallel": parallel, "gpus": gpus, "evaluate": asked})
        plan = make_plan(given, machine_of(given, "h100", None, None))
        assert any("every_steps with parallel zero2 on 2 ranks" in str(problem) for problem in plan.problems) == told
        assert plan.can_run != told


def test_stages_of_one_objective_are_told_apart(recipe: Recipe) -> None:
    methods: tuple[MethodName, ...] = ("vanilla", "pmo", "dpa-prior")
    plan = make_plan(recipe.model_copy(update={"methods": methods}), machine_of(recipe, "h100", None, None))
    lines = plan_text(plan).partition("memory per GPU")[2].splitlines()
    names = [line.partition(")")[0] for line in lines if line.startswith(("pretrain", "finetune"))]
    assert names == [f"{stage} ({name}" for stage in ("pretrain", "finetune") for name in methods]


def test_missing_data_is_said_and_counted_with_what_is_known() -> None:
    plan = of_7b("gpus=8", "parallel=fsdp")
    assert [stage.samples for stage in plan.stages] == [558_128, 558_128, 737_000]
    assert not any(stage.counted for stage in plan.stages)
    assert any("blip_laion_cc_sbu_558k.json is not here" in str(problem) for problem in plan.problems)
    text = plan_text(plan)
    assert "assumed*" in text
    assert "known configuration" in text
    json.dumps(plan.to_dict())


def test_unknown_data_is_an_error(recipe: Recipe) -> None:
    gone = load_recipe(PAPER / "common.yaml", ["model.llm=lab:llm", "model.vision_tower=lab:tower"])
    plan = make_plan(gone, machine_of(gone, "h100", None, None))
    assert any("nothing is known of data/captions.json" in str(problem) for problem in plan.problems)


def test_data_by_a_pattern_are_found_and_weights_count(tmp_path: Path) -> None:
    (tmp_path / "one.parquet").touch()
    settings = [
        f"data.captions.path={tmp_path}/*.parquet",
        "data.instructions.limit=100",
        "data.instructions.weight=1.5",
    ]
    found = load_recipe(PAPER / "common.yaml", ["model.llm=lab:llm", "model.vision_tower=lab:tower", *settings])
    plan = make_plan(found, machine_of(found, "h100", None, None))
    assert not any("parquet is not here" in str(problem) for problem in plan.problems)
    assert [(stage.stage, stage.samples) for stage in plan.stages] == [("finetune", 150)]


def test_text_cache_saves_the_second_pass_and_costs_disk() -> None:
    cached, passes = of_7b(), of_7b("stages.pretrain.text_cache=false")
    of = [next(stage.flops for stage in plan.stages if stage.stage == "pretrain") for plan in (cached, passes)]
    assert of[0] <= of[1]  # one epoch: made once, read once
    assert "text-only cache" in cached.disk
    assert "text-only cache" not in passes.disk
    vision = of_7b("train.vision_cache=true")
    assert vision.disk["vision cache, pretrain"] == 2.0 * 558_128 * 576 * 1024


def test_calibration_measures_this_device(recipe: Recipe) -> None:
    machine = calibrate(recipe, machine_of(recipe, "h100", None, None), ("proxy", "pretrain", "finetune"))
    assert machine.measured
    assert all(0 < share < 1 for share in machine.mfu.values())
    slow = replace(machine, mfu=dict.fromkeys(machine.mfu, 1e-9))
    assert make_plan(recipe, slow).hours > make_plan(recipe, machine).hours
    stage = recipe.stages.finetune.model_copy(update={"objective": "prior"})
    prior = recipe.model_copy(update={"stages": recipe.stages.model_copy(update={"finetune": stage})})
    assert calibrate(prior, machine_of(prior, "h100", None, None), ("finetune",)).measured


def test_an_unknown_gpu_is_refused(recipe: Recipe) -> None:
    with pytest.raises(UserError, match="known: h100"):
        machine_of(recipe, "b9000", None, None)
    assert isinstance(machine_of(recipe, "a100", 40.0, 0.3), Machine)
