"""contrast(): order and contents of its parts, where the gradient goes, what is never made, what is left alone."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM

import dpa
from dpa.models.contrast import Contrast, contrast
from dpa.models.text_pass import text_only_logprobs
from dpa.objectives import relevance, weighted_nll
from dpa.testing.models import MODEL_TYPES, VOCABULARY, ModelType, tiny_batch, tiny_llava
from tests.oracles import contrast as oracle

Fidelity = Literal["exact", "official"]
FIDELITIES: tuple[Fidelity, ...] = ("exact", "official")
STRUCTURES = [
    "bos text:2 image label:5 text:2 label:3",
    "text:4 label:3 text:1 label:1",
    "image label:3 text:2 label:4 text:3",
    "text:2 image text:1 image text:2 label:2",
]


def test_public_names() -> None:
    assert dpa.contrast is contrast
    assert dpa.Contrast is Contrast


@pytest.mark.parametrize("fidelity", FIDELITIES)
def test_parts_are_in_the_order_of_supervised_positions(fidelity: Fidelity) -> None:
    batch = tiny_batch(STRUCTURES)
    result = contrast(tiny_llava("qwen2"), batch, fidelity=fidelity)
    assert torch.equal(result.labels, batch.input_ids[batch.supervised])
    assert result.sample_index.tolist() == [0] * 8 + [1] * 4 + [2] * 7 + [3] * 2
    assert result.has_image.tolist() == [True] * 8 + [False] * 4 + [True] * 9
    runs = [5, 3, 3, 1, 3, 4, 2]
    assert result.segment_ids.tolist() == [segment for segment, length in enumerate(runs) for _ in range(length)]
    assert result.logit_with is None
    assert result.logit_without is None
    assert result.logp_with.dtype == torch.float32


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_both_passes_against_the_oracle(model_type: ModelType) -> None:
    """Soft-cap included: the oracle caps Gemma-2's logits in both passes."""
    model = oracle.with_literal_attention(tiny_llava(model_type, dtype=torch.float64))
    batch = oracle.with_likely_labels(model, tiny_batch(STRUCTURES))
    result = contrast(model, batch, logits=True)
    real_BL = batch.attention_mask.bool()
    with torch.no_grad():
        with_BLV = oracle.full_logits(model, batch, real_BL, softcap=True)
        without_BLV = oracle.full_logits(model, batch, real_BL & ~batch.is_image, softcap=True)
    assert result.logp_without is not None
    assert result.logit_with is not None
    assert result.logit_without is not None
    same = oracle.follows_text(batch) & result.has_image
    for found, logits_BLV, function, where in (
        (result.logp_with, with_BLV, oracle.log_softmax, torch.ones_like(same)),
        (result.logp_without, without_BLV, oracle.log_softmax, same),
        (result.logit_with, with_BLV, oracle.identity, torch.ones_like(same)),
        (result.logit_without, without_BLV, oracle.identity, same),
    ):
        expected = oracle.at_labels(batch, logits_BLV, function)
        torch.testing.assert_close(found[where].detach(), expected[where], rtol=0, atol=1e-12)
    assert result.logp_without[~result.has_image].isnan().all()
    assert not result.logp_without[result.has_image].isnan().any()
    assert result.official is None


def test_relevance_is_not_idle_on_these_models() -> None:
    """What the other tests compare is spread over the weights' range."""
    model = oracle.with_literal_attention(tiny_llava("qwen2", dtype=torch.float64))
    result = contrast(model, oracle.with_likely_labels(model, tiny_batch(STRUCTURES)))
    assert result.logp_without is not None
    values = relevance("cmo", result.logp_with, result.logp_without)[result.has_image]
    assert float(values.std()) > 0.05


@pytest.mark.parametrize("fidelity", FIDELITIES)
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_gradient_is_that_of_the_pass_with_image_alone(model_type: ModelType, fidelity: Fidelity) -> None:
    batch = tiny_batch(STRUCTURES)
    together, alone = tiny_llava(model_type), tiny_llava(model_type)
    result = contrast(together, batch, fidelity=fidelity, logits=True)
    for part in (result.logp_without, result.logit_with, result.logit_without):
        assert part is not None
        assert not part.requires_grad
    if result.official is not None:
        for part in (result.official.logp_with, result.official.logp_without):
            assert part is not None
            assert not part.requires_grad
    result.logp_with.sum().backward()
    contrast(alone, batch, fidelity=fidelity, without=False).logp_with.sum().backward()
    for (name, one), two in zip(together.named_parameters(), alone.parameters(), strict=True):
        assert (one.grad is None) == (two.grad is None), name
        if one.grad is not None and two.grad is not None:
            assert torch.equal(one.grad, two.grad), name
    assert together.model.multi_modal_projector.linear_1.weight.grad is not None
    assert together.lm_head.weight.grad is not None


@pytest.mark.parametrize("fidelity", FIDELITIES)
def test_gradient_reaches_all_weights_under_autocast(fidelity: Fidelity) -> None:
    """autocast keeps its casts of the weights; one made in the pass without gradient must not serve the other."""
    batch, gradients = tiny_batch(STRUCTURES), []
    for without in (True, False):
        model = tiny_llava("qwen2")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            result = contrast(model, batch, fidelity=fidelity, without=without)
        assert result.logp_with.dtype == torch.float32
        result.logp_with.sum().backward()
        layer = model.get_decoder().layers[0]
        gradients.append([layer.self_attn.q_proj.weight.grad, layer.mlp.down_proj.weight.grad])
    for one, two in zip(*gradients, strict=True):
        assert one is not None
        assert float(one.abs().sum()) > 0
        assert torch.equal(one, two)


class Watch(TorchDispatchMode):
    """Rows of the tallest tensor whose last dimension is the vocabulary."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for part in out if isinstance(out, tuple | list) else (out,):
            if isinstance(part, Tensor) and part.ndim > 1 and part.shape[-1] == VOCABULARY:
                self.rows = max(self.rows, part.numel() // VOCABULARY)
        return out


@pytest.mark.parametrize("fidelity", FIDELITIES)
def test_logits_of_unsupervised_positions_are_never_made(fidelity: Fidelity) -> None:
    batch = tiny_batch(["bos text:70 image text:20 label:5", "bos image label:3 text:90"])
    model = tiny_llava("qwen2", hidden_size=64)
    with Watch() as full:
        model(input_ids=batch.input_ids, pixel_values=batch.pixel_values)
    with Watch() as ours:
        result = contrast(model, batch, fidelity=fidelity, logits=True)
        result.logp_with.sum().backward()
    read = 8 if result.official is None else len(result.official.positions)
    assert read < 16
    assert full.rows == batch.input_ids.numel()
    # The head's own transpose [H, V] has 64 rows.
    assert ours.rows <= 64


@pytest.mark.parametrize("fidelity", FIDELITIES)
def test_the_pass_without_gradient_comes_first_and_in_evaluation_mode(fidelity: Fidelity) -> None:
    model = tiny_llava("qwen2")
    model.train()
    modes: list[tuple[bool, bool]] = []
    decoder = model.get_decoder()
    decoder.register_forward_pre_hook(
        lambda module, _: modes.append((torch.is_grad_enabled(), any(part.training for part in module.modules())))
    )
    contrast(model, tiny_batch(STRUCTURES), fidelity=fidelity)
    assert modes == [(False, False), (True, True)]


@pytest.mark.parametrize("fidelity", FIDELITIES)
def test_the_model_is_left_as_it_was(fidelity: Fidelity) -> None:
    model = tiny_llava("gemma2")
    model.train()
    model.model.vision_tower.eval()
    for layer in model.get_decoder().layers:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
    before = [
        (module.training, len(module._forward_pre_hooks), len(module._forward_hooks)) for module in model.modules()
    ]
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    contrast(model, tiny_batch(STRUCTURES), fidelity=fidelity).logp_with.sum().backward()
    after = [
        (module.training, len(module._forward_pre_hooks), len(module._forward_hooks)) for module in model.modules()
    ]
    assert after == before
    assert all(layer.gradient_checkpointing for layer in model.get_decoder().layers)
    assert torch.is_grad_enabled()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("fidelity", FIDELITIES)
@pytest.mark.parametrize("structures", [["bos image text:3"], ["bos text:3", "bos image text:2"]])
def test_a_batch_without_labels_can_be_backpropagated(structures: list[str], fidelity: Fidelity) -> None:
    """A rank that has run out of samples takes part with such a batch."""
    model = tiny_llava("qwen2")
    result = contrast(model, tiny_batch(structures), fidelity=fidelity, logits=True)
    assert result.logp_with.shape == result.segment_ids.shape == (0,)
    assert result.logp_without is not None
    assert result.logp_without.shape == (0,)
    weighted_nll(result.logp_with, torch.zeros(0))[0].backward()
    assert model.model.multi_modal_projector.linear_1.weight.grad is not None


@pytest.mark.parametrize("fidelity", FIDELITIES)
def test_without_is_left_out_where_nobody_needs_it(fidelity: Fidelity) -> None:
    model, calls = tiny_llava("qwen2"), []
    model.get_decoder().register_forward_pre_hook(lambda _module, _: calls.append(1))
    result = contrast(model, tiny_batch(STRUCTURES), fidelity=fidelity, without=False, logits=True)
    assert len(calls) == 1
    assert result.logp_without is None
    assert result.logit_without is None
    assert result.logit_with is not None


def test_an_llm_alone_can_be_trained_on_text() -> None:
    """Stage 1 has no tower; its samples have no image, so that nothing is contrasted."""
    model = tiny_llava("qwen2")
    llm = AutoModelForCausalLM.from_config(model.config.text_config)
    llm.model.load_state_dict(model.get_decoder().state_dict())
    llm.lm_head.load_state_dict(model.lm_head.state_dict())
    batch = tiny_batch(["bos label:6", "bos label:3"])
    assert torch.equal(contrast(llm, batch).logp_with, contrast(model, batch).logp_with)


@pytest.mark.parametrize("text_positions", ["original", "contiguous"])
def test_text_positions_are_handed_on(text_positions: Any) -> None:
    model, batch = tiny_llava("qwen2"), tiny_batch(STRUCTURES)
    result = contrast(model, batch, text_positions=text_positions)
    expected = text_only_logprobs(model, batch, text_positions=text_positions).logp
    assert result.logp_without is not None
    assert torch.equal(result.logp_without.nan_to_num(), expected.nan_to_num())
    other = contrast(model, batch, text_positions="original" if text_positions == "contiguous" else "contiguous")
    assert other.logp_without is not None
    assert not torch.equal(result.logp_without.nan_to_num(), other.logp_without.nan_to_num())
