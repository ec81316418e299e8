"""How fast a recipe's stages really are on this device: a few steps of each, with the recipe's own model and data."""

from __future__ import annotations

import itertools
import time
from contextlib import closing
from dataclasses import replace

import torch
from torch import nn

from dpa.models.freeze import set_trainable
from dpa.models.lora import attach_lora
from dpa.models.parts import load_llm
from dpa.models.vlm import build_vlm
from dpa.objectives import objective
from dpa.pipeline.inputs import Inputs, settings_of, store_of
from dpa.plan.count import flops
from dpa.plan.machine import Machine
from dpa.plan.plan import row_of, sizes_of
from dpa.plan.shapes import read_parts
from dpa.plan.workload import counted, workload
from dpa.recipe import Recipe, StageName
from dpa.train.loop import set_checkpointing
from dpa.train.parallel import compute_dtype
from dpa.train.step import TrainStep, packs, step_settings

_WARM, _TIMED = 1, 3
"""Micro-batches."""


def calibrate(recipe: Recipe, machine: Machine, stages: tuple[StageName, ...]) -> Machine:
    """The machine with the share of the data sheet's FLOP/s that forward and backward reach here.

    The connector of stage 2 and 3 starts at random and stage 2 reads the original LLM: neither changes the speed.

    Raises:
        UserError: data or model are not here.
    """
    inputs = Inputs(recipe, store_of(recipe))
    parts = read_parts(recipe.model, lora_rank=recipe.stages.proxy.lora.rank)
    measured = dict(machine.mfu)
    for stage in stages:
        settings = settings_of(recipe, stage)
        work = workload(
            counted(inputs.stage(stage).audit, parts.image_tokens),
            settings,
            image_tokens=parts.image_tokens,
            ranks=1,
            packing=packs(settings, recipe.fidelity),
            seed=recipe.seed,
        )
        row = row_of(recipe, recipe.objective(recipe.methods[0], stage))
        done = flops(sizes_of(parts, recipe), stage, row, work.mean, checkpointing=settings.gradient_checkpointing)
        measured[stage] = done["total"] / _seconds(recipe, stage, inputs) / machine.gpu.flops
    return replace(machine, mfu=measured, measured=True)


def _seconds(recipe: Recipe, stage: StageName, inputs: Inputs) -> float:
    """Mean seconds of a micro-batch, forward and backward."""
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    dtype, settings = compute_dtype(recipe.train), settings_of(recipe, stage)
    model = _model(recipe, stage, dtype)
    set_trainable(model, stage)
    nn.Module.to(model, device)
    model.train()
    if settings.gradient_checkpointing:
        set_checkpointing(model, True)
    name = recipe.objective(recipe.methods[0], stage)
    chosen = step_settings(settings, objective_name=name, fidelity=recipe.fidelity)
    reference = None
    if stage == "finetune" and objective(name).frozen_reference:
        reference = nn.Module.eval(load_llm(recipe.model, dtype=dtype)).requires_grad_(False)
        nn.Module.to(reference, device)
    step = TrainStep(model, chosen, reference=reference, autocast=None if dtype == torch.float32 else dtype)
    batches = inputs.stage(stage).batches(recipe, settings, inputs.rules)
    began = time.perf_counter()
    waited = 0.0
    with closing(batches.open(start=0, rank=0, ranks=1, pin_memory=False)) as stream:
        for number, loaded in enumerate(itertools.islice(stream, _WARM + _TIMED)):
            if number == _WARM:
                began, waited = _now(device), 0.0
            asked = time.perf_counter()
            batch = loaded.batch.to(device)
            waited += time.perf_counter() - asked
            torch.autograd.backward(step(batch, 1.0).loss_sum)
    return max(1e-9, _now(device) - began - waited) / max(1, number + 1 - _WARM)


def _model(recipe: Recipe, stage: StageName, dtype: torch.dtype) -> nn.Module:
    if stage == "proxy":
        return attach_lora(load_llm(recipe.model, dtype=dtype), recipe.stages.proxy.lora, seed=recipe.seed)
    settings = settings_of(recipe, stage)
    trained = torch.float32 if stage == "finetune" else dtype
    vlm = build_vlm(recipe.model, dtype=trained, tower_dtype=dtype, seed=recipe.seed, image_mode=settings.image_mode)
    return vlm.model


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
