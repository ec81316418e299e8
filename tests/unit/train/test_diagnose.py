from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from dpa.models.freeze import set_trainable
from dpa.testing.models import tiny_batch, tiny_llava
from dpa.train.diagnose import find_non_finite
from dpa.train.settings import StageSettings
from dpa.train.step import TrainStep, step_settings
from dpa.types import Batch
from tests.stages import IMAGES, TEXTS

CPU = torch.device("cpu")


def step(stage: Any = "finetune") -> TrainStep:
    model = tiny_llava("qwen2")
    set_trainable(model, stage)
    settings = StageSettings(learning_rate=1e-3)
    return TrainStep(model, step_settings(settings, objective_name="cmo", fidelity="exact"))


def named(batch: Batch, *names: str) -> Batch:
    return replace(batch, sample_ids=names)


def two_batches() -> list[tuple[Batch, float | None]]:
    first = named(tiny_batch(IMAGES), "i0", "i1", "i2", "i3")
    return [(first, None), (named(tiny_batch(TEXTS), "t0", "t1"), 0.2)]


def test_nothing_wrong() -> None:
    module = step()
    assert find_non_finite(module, two_batches(), CPU) is None
    assert all(value.grad is None for value in module.parameters()), "no gradient is left behind"


def test_pixels() -> None:
    batches = two_batches()
    pixels = batches[0][0].pixel_values
    assert pixels is not None
    broken = pixels.clone()
    broken[1, 0, 3, 3] = torch.nan
    batches[0] = (replace(batches[0][0], pixel_values=broken), None)
    text = find_non_finite(step(), batches, CPU)
    assert text is not None
    assert text.startswith("micro-batch of samples i0, i1, i2, i3; first non-finite output: model.vision_tower.")
    assert text.endswith("patch_embedding")


def test_parameter() -> None:
    module = step()
    with torch.no_grad():
        module.model.model.language_model.layers[1].mlp.up_proj.weight[0, 0] = torch.inf
    text = find_non_finite(module, two_batches(), CPU)
    assert text is not None
    assert "first non-finite output: model.language_model.layers.1.mlp.up_proj; parameter" in text
    assert text.endswith("model.language_model.layers.1.mlp.up_proj.weight is itself not finite")


def test_the_second_micro_batch() -> None:
    module, batches = step(), two_batches()
    image_ids, text_ids = (set(batch.input_ids.flatten().tolist()) for batch, _ in batches)
    only_here = min(text_ids - image_ids)
    with torch.no_grad():
        module.model.get_input_embeddings().weight[only_here] = torch.nan
    text = find_non_finite(module, batches, CPU)
    assert text is not None
    assert text.startswith("micro-batch of samples t0, t1; first non-finite output: model.language_model.embed_tokens;")


def test_gradient() -> None:
    """The loss is fine, its derivative is not: named is the module nearest to the loss."""
    module = step()
    layer = module.model.model.language_model.layers[0]

    def spoil(_module: Any, _inputs: Any, output: Any) -> None:
        tensor = output[0] if isinstance(output, tuple) else output
        if tensor.requires_grad:
            tensor.register_hook(lambda gradient: gradient * torch.inf)

    layer.mlp.down_proj.register_forward_hook(spoil)
    text = find_non_finite(module, two_batches(), CPU)
    assert text is not None
    assert "first non-finite gradient: at the output of model.language_model.layers.0.mlp.down_proj" in text


def test_gradient_of_a_parameter_alone() -> None:
    module = step("pretrain")
    module.model.model.multi_modal_projector.linear_1.bias.register_hook(lambda gradient: gradient * torch.nan)
    text = find_non_finite(module, two_batches(), CPU)
    assert text is not None
    assert text.endswith("first non-finite gradient: of parameter model.multi_modal_projector.linear_1.bias")


def test_the_loss_itself() -> None:
    module, batches = step(), two_batches()
    text = find_non_finite(module, [(batches[1][0], float("nan"))], CPU)
    assert text == "micro-batch of samples t0, t1; first non-finite output: the loss (all modules' outputs are finite)"


def test_long_lists_are_cut() -> None:
    names = [f"n{i}" for i in range(11)]
    batch = named(tiny_batch(["text:2 label:2"] * 11), *names)
    text = find_non_finite(step(), [(batch, float("nan"))], CPU)
    assert text is not None
    assert "samples n0, n1, n2, n3, n4, n5, n6, n7 and 3 more;" in text


@pytest.mark.parametrize("checkpointing", [False, True])
def test_hooks_are_gone_afterwards(checkpointing: bool) -> None:
    module = step()
    if checkpointing:
        module.model.train()
        module.model.activation_checkpointing_enable({"use_reentrant": False})
    before = {name: len(part._forward_hooks) for name, part in module.named_modules()}
    assert find_non_finite(module, two_batches(), CPU) is None
    assert {name: len(part._forward_hooks) for name, part in module.named_modules()} == before
