"""What stage 2 did, seen before stage 3 hides it: probes during it, the original LLM with its connector after it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dpa.analyze.runs import PROBES
from dpa.evaluate.benchmarks import run_benchmarks
from dpa.evaluate.scores import PREDICTIONS
from dpa.lab.probe import ProbeSet, make_probe_set, probe
from dpa.log import get_logger
from dpa.models.vlm import Vlm, build_vlm
from dpa.recipe import Recipe
from dpa.results import ARTEFACTS
from dpa.store import disk_errors, write_json, write_text

log = get_logger(__name__)

MEASUREMENTS = "measurements.json"
"""In a method's folder: name -> number, whatever a comparison of runs may tabulate beside the summary's figures."""

OnStep = Callable[[Mapping[str, Any]], None]


def watch_pretrain(recipe: Recipe, vlm: Vlm, work: Path, *, dtype: torch.dtype) -> OnStep | None:
    """A hook that probes the model in training after ``evaluate.probe_steps``; None where the recipe names none.

    Nothing of the training changes: no gradient, no random number, no flag. Lines of steps that a continued stage makes
    again replace the earlier ones.

    Args:
        dtype: of the stage's products.
    """
    steps = frozenset(recipe.evaluate.probe_steps)
    if not steps:
        return None
    probes = make_probe_set(vlm)

    def on_step(row: Mapping[str, Any]) -> None:
        if row["step"] in steps:
            found = _probed(vlm.model, probes, dtype)
            kept = [line for line in read_probes(work / PROBES) if line["step"] < row["step"]]
            lines = [*kept, {"step": row["step"], **found}]
            with disk_errors(work):
                write_text(work / PROBES, "".join(json.dumps(line) + "\n" for line in lines))

    return on_step


def read_probes(path: Path) -> list[dict[str, float]]:
    """The lines of a :data:`PROBES` file; none where there is no file."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _probed(model: nn.Module, probes: ProbeSet, dtype: torch.dtype) -> dict[str, float]:
    device = next(model.parameters()).device
    with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
        return probe(model, probes)


def measure_pretrain(recipe: Recipe, folder: Path) -> None:
    """The original LLM with stage 2's connector, without stage 3: benchmarks and probe; writes ``measurements.json``.

    Names: ``pretrain.BENCHMARK.accuracy`` and its like, ``pretrain.probe.NAME`` of the original LLM, and of the model
    in training at its first and last probe ``probe.first.NAME``, ``probe.last.NAME``.

    Args:
        folder: of the method, with the links to its artefacts.

    Raises:
        DpaError: see the benchmarks.
    """
    artefact = folder / ARTEFACTS["pretrain"]
    log.info("stage 2 alone: the original LLM with the connector in %s", artefact)
    vlm = build_vlm(recipe.model, connector=artefact / "mm_projector.bin", dtype=torch.float32)
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    vlm.model.to(torch.device("cpu") if accelerator is None else accelerator)  # type: ignore[arg-type]
    out = folder / f"{PREDICTIONS}-pretrain"
    found: dict[str, float] = {}
    if recipe.evaluate.after_pretrain != "probe":
        for name, result in run_benchmarks(vlm.model, vlm.processor, recipe.evaluate, out).items():
            found |= {f"pretrain.{name}.{key}": value for key, value in result.items() if isinstance(value, float)}
    if recipe.evaluate.probe_steps:
        table = _probed(vlm.model, make_probe_set(vlm), torch.float32)
        found |= {f"pretrain.probe.{key}": value for key, value in table.items()}
        lines = read_probes(artefact.resolve().parent / PROBES)
        if not lines:
            log.warning(
                "%s: stage 2 was trained without evaluate.probe_steps, so nothing was probed on its way", folder
            )
        for when, line in (("first", lines[:1]), ("last", lines[-1:])):
            found |= {f"probe.{when}.{key}": value for one in line for key, value in one.items()}
    with disk_errors(folder):
        write_json(folder / MEASUREMENTS, found)
