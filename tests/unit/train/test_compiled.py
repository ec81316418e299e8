"""A compiled stage is the same stage: losses, names of weights, saved states; and nothing of it stays behind."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.backends.debugging import aot_eager

from dpa.models.freeze import set_trainable
from dpa.testing.models import tiny_batch, tiny_llava
from dpa.train.compiled import compiled, uncompiled
from dpa.train.diagnose import find_non_finite
from dpa.train.loop import train_stage
from dpa.train.metrics import read_metrics
from dpa.train.settings import StageSettings, TrainSettings
from dpa.train.step import TrainStep, step_settings
from tests.stages import IMAGES, Interrupted, Options, stop_after, tiny_job


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The real capture of graphs and their autograd, without the C++ compiler, which takes half a minute."""
    made: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        made.append(1)
        return aot_eager(graph, inputs)

    whole = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **more: whole(self, backend=backend, **more))
    torch._dynamo.reset()
    yield made
    torch._dynamo.reset()


def train(work: Path, *, compile_layers: bool, checkpointing: bool = False, stop: int | None = None) -> Any:
    """(metrics, trained weights) of two optimizer steps of two micro-batches."""
    more = {"gradient_checkpointing": checkpointing}
    options = Options(structures=IMAGES, max_steps=2, micro_batch=3, global_batch=6, save_steps=1, more=more)
    job = tiny_job(work, options, on_step=[] if stop is None else [stop_after(stop)])
    job = replace(job, train=job.train.model_copy(update={"compile": compile_layers}))
    train_stage(job)
    return read_metrics(job.metrics), {name: value.detach().clone() for name, value in job.trained().items()}


def test_goes_on_with_what_was_begun_without(tmp_path: Path, programs: list[int]) -> None:
    """The same losses and weights, with gradient checkpointing, too; saved states are the same files."""
    plain, weights = train(tmp_path / "whole", compile_layers=False)
    with pytest.raises(Interrupted):
        train(tmp_path / "again", compile_layers=False, stop=2)
    assert not programs
    rows, found = train(tmp_path / "again", compile_layers=True, checkpointing=True)
    # with and without gradient, and again for whatever is specialised; not one per batch and layer
    assert 2 <= len(programs) <= 6
    for name in ("loss", "grad_norm", "mean_weight"):  # the same operations, fused: roundings of float32
        assert [row[name] for row in rows] == pytest.approx([row[name] for row in plain], rel=1e-5)
    for name, value in weights.items():
        # Adam divides by a gradient's own size, so roundings of tiny gradients grow: 5e-3 of the learning rate
        torch.testing.assert_close(found[name], value, rtol=0, atol=5e-6)


def test_state_dict_and_layers_afterwards() -> None:
    assert TrainSettings().compile is False
    model = tiny_llava("qwen2")
    names = list(model.state_dict())
    layers = list(model.get_decoder().layers)
    with compiled(model):
        assert list(model.state_dict()) == names
        assert all(layer._compiled_call_impl is not None for layer in layers)
        with uncompiled(model):
            assert all(layer._compiled_call_impl is None for layer in layers)
        assert all(layer._compiled_call_impl is not None for layer in layers)
    assert all(module._compiled_call_impl is None for module in model.modules())


def test_the_search_for_a_broken_module_still_sees_inside_the_layers(programs: list[int]) -> None:
    model = tiny_llava("qwen2")
    set_trainable(model, "finetune")
    settings = step_settings(StageSettings(learning_rate=1e-3), objective_name="uniform", fidelity="exact")
    step, batch = TrainStep(model, settings), tiny_batch(IMAGES)
    with compiled(model):
        step(batch, None)
        assert programs
        with torch.no_grad():
            model.get_parameter("model.language_model.layers.1.mlp.up_proj.weight")[0, 0] = torch.inf
        text = find_non_finite(step, [(batch, None)], torch.device("cpu"))
    assert text is not None
    assert "first non-finite output: model.language_model.layers.1.mlp.up_proj" in text
