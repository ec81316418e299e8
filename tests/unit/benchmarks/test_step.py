"""benchmarks/step.py keeps its promises on a model of seconds: JSON, all rows, and the reference's own loss."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from benchkit.accounting import figure_that_counts, flops, peak_bytes, sizes_of
from benchkit.clock import TEXT_ONLY_PASS, Sections, timed_doors
from benchkit.shapes import SHAPES, build_model
from benchkit.variants import DEFAULT_ROWS, DOORS, VARIANTS, loss_with_official_fidelity, make_case, run_step
from torch.utils.flop_counter import FlopCounterMode

from dpa.models import contrast as contrast_module

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "step.py"
CPU, TINY = torch.device("cpu"), SHAPES["tiny"]


def test_command() -> None:
    """In stage 2, memory in processes of their own, as a user runs it."""
    command = [sys.executable, str(SCRIPT), "--shape", "tiny", "--stage", "2", "--repeats", "2", "--json"]
    result: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert [row["name"] for row in result["rows"]] == ["vanilla", "official", "ours"]
    for row in result["rows"]:
        for name in ("seconds", "cpu_seconds", "peak_bytes", "tokens_per_s", "loss", "mfu"):
            assert row[name] > 0, (row["name"], name)
        assert sum(row["parts"].values()) == pytest.approx(1)
    assert result["official_loss_difference"] < 1e-5  # float32 at a loss of 6: 12 roundings
    assert 0 < result["ratios"]["text_only_pass_share"] < 1


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_reference_has_the_loss_of_official_fidelity(stage: int) -> None:
    case = make_case(TINY, stage, device=CPU, precision="fp32", checkpointing=False)
    rows = {name: VARIANTS[name] for name in (VARIANTS if stage == 2 else DEFAULT_ROWS)}
    losses = {name: run_step(case, variant) for name, variant in rows.items()}
    assert losses["official"] == pytest.approx(loss_with_official_fidelity(case), abs=1e-5)
    again = {name: run_step(case, variant) for name, variant in rows.items()}
    assert again == losses, "a step changed the weights"
    if stage > 1:
        assert losses.get("ours-cached", losses["ours"]) == losses["ours"]
        assert losses["official"] != pytest.approx(losses["vanilla"], abs=1e-5), "all weights are equal"


def test_sections_are_exclusive_and_doors_are_put_back() -> None:
    case = make_case(TINY, 2, device=CPU, precision="fp32", checkpointing=False)
    before, sections = contrast_module.label_logprobs, Sections(CPU)
    with timed_doors(sections, DOORS):
        run_step(case, VARIANTS["ours"], sections)
    assert contrast_module.label_logprobs is before
    expected = {"tower_connector", "pass", "head", TEXT_ONLY_PASS, "backward", "optimizer", "other"}
    assert set(sections.wall) == expected
    assert all(seconds >= 0 for seconds in sections.wall.values())


def matrices(model: torch.nn.Module, part: str, *, trained: bool | None = None) -> int:
    return sum(
        value.numel()
        for name, value in model.named_parameters()
        if part in name and value.ndim == 2 and (trained is None or value.requires_grad == trained)
    )


def test_counted_parameters_are_the_models() -> None:
    model = build_model(TINY, 2, device=CPU, dtype=torch.float32)
    sizes = sizes_of(TINY)
    assert sizes.llm.layer == matrices(model, "language_model.layers.0.")
    assert sizes.tower_parameters == matrices(model, "vision_tower.encoder.layers")
    assert sizes.connector == matrices(model, "multi_modal_projector", trained=True)
    assert sizes.lora == matrices(build_model(TINY, 1, device=CPU, dtype=torch.float32), "lora_")


def test_counted_flops_are_those_of_the_operations() -> None:
    """Against torch's own counter; it does not know the CPU's attention, nor addmm_, half of the head's products."""
    case = make_case(TINY, 3, device=CPU, precision="fp32", checkpointing=False)
    with FlopCounterMode(display=False) as counter:
        run_step(case, VARIANTS["vanilla"])
    samples, llm, tower = TINY.micro_batch[2], TINY.llm, TINY.tower
    unknown = 3 * 2.0 * llm.layers * llm.hidden * samples * TINY.length(3) ** 2
    unknown += 4.0 * tower.layers * tower.hidden * samples * (tower.image_tokens + 1) ** 2
    counted = flops(TINY, 3, "vanilla")
    # the patches' embedding is not in the count
    assert counter.get_total_flops() == pytest.approx(counted["total"] - counted["head"] / 2 - unknown, rel=0.01)


def test_the_figure_that_counts_fits() -> None:
    shape = SHAPES["qwen2.5-7b"]
    assert peak_bytes(shape, 2, "ours", checkpointing=True)["total"] < 80e9
    found = figure_that_counts(shape, 2)
    assert found["projected"] is True
    assert found["ours_peak_bytes"] < 80e9
    assert found["speed_up"] > found["speed_up_from_products_alone"] > 1
