"""Several samples in a row give the numbers of a row each: both passes, all families, all forms of masks, no leak."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_mask
from transformers import AttentionInterface, AttentionMaskInterface, LlavaForConditionalGeneration
from transformers.masking_utils import flash_attention_mask

from dpa.errors import UserError
from dpa.models import attention as attention_module
from dpa.models.attention import DENSE_ROW, attention_arguments, packed_row_length
from dpa.models.contrast import Contrast, contrast
from dpa.models.rows import arrange
from dpa.models.text_pass import text_only_logprobs
from dpa.models.vlm import hidden_states
from dpa.objectives import token_weights, weighted_nll
from dpa.testing.models import MODEL_TYPES, ModelType, tiny_batch, tiny_llava, tiny_text_config
from dpa.types import Batch
from tests.oracles import contrast as oracle

STRUCTURES = [
    "bos text:2 image label:5 text:2 label:3",
    "text:4 label:3 text:1 label:1",  # no image, no BOS
    "image label:3 text:2 label:4 text:3",  # the image first
    "text:2 image text:1 image text:2 label:2",
    "image label:9",  # its first label is predicted from a document start
    "bos label:2",
    "bos image image text:9 label:20",
]
IMAGES = [structure for structure in STRUCTURES if "image" in structure]
TEXTS = [structure for structure in STRUCTURES if "image" not in structure]
CASES: list[tuple[ModelType, int | None]] = [
    *[(model_type, None) for model_type in MODEL_TYPES],
    *[(model_type, 5) for model_type in ("qwen2", "gemma2", "mistral")],
]
FLASH = "flash_oracle"


def in_float64(structures: list[str] = STRUCTURES, **settings: Any) -> Batch:
    batch = tiny_batch(structures, **settings)
    return replace(batch, pixel_values=None if batch.pixel_values is None else batch.pixel_values.double())


def model_in_float64(model_type: ModelType, window: int | None = None) -> LlavaForConditionalGeneration:
    """Over the literal attention: exact also for Gemma-2, whose eager attention rounds to float32."""
    return oracle.with_literal_attention(tiny_llava(model_type, sliding_window=window, dtype=torch.float64))


def assert_same(found: Contrast, expected: Contrast, tolerance: float) -> None:
    for name in ("labels", "segment_ids", "sample_index", "has_image"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    for name in ("logp_with", "logp_without", "logit_with", "logit_without"):
        pair = getattr(found, name), getattr(expected, name)
        torch.testing.assert_close(*pair, rtol=0, atol=tolerance, equal_nan=True, msg=name)


@pytest.fixture(params=[1, DENSE_ROW])
def dense_row(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Several rows, some of them padded; and all in one."""
    monkeypatch.setattr(attention_module, "DENSE_ROW", request.param)
    return int(request.param)


@pytest.mark.usefixtures("dense_row")
@pytest.mark.parametrize("structures", [STRUCTURES, IMAGES, TEXTS], ids=["mixed", "images", "texts"])
@pytest.mark.parametrize(("model_type", "window"), CASES)
def test_packed_equals_padded(model_type: ModelType, window: int | None, structures: list[str]) -> None:
    model, batch = model_in_float64(model_type, window), in_float64(structures)
    expected = contrast(model, batch, logits=True)
    assert_same(contrast(model, batch, logits=True, packing=True), expected, 1e-12)


@pytest.mark.usefixtures("dense_row")
@pytest.mark.parametrize(("model_type", "window"), CASES)
def test_kernels_in_use(model_type: ModelType, window: int | None) -> None:
    """sdpa, and eager for Gemma-2, in float32."""
    model, batch = tiny_llava(model_type, sliding_window=window), tiny_batch(STRUCTURES)
    expected = contrast(model, batch, logits=True)
    # These models amplify rounding on purpose (their log-probs reach -20); float64 above shows equality.
    assert_same(contrast(model, batch, logits=True, packing=True), expected, 5e-5)


def weighted(result: Contrast) -> Tensor:
    assert result.logp_without is not None
    differences = (result.logp_with.detach().exp() - result.logp_without.exp()).nan_to_num()
    weights = token_weights(differences, result.segment_ids, minimum=1e-4, maximum=0.05)
    return weighted_nll(result.logp_with, weights)[0]


@pytest.mark.usefixtures("dense_row")
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_loss_and_gradients(model_type: ModelType) -> None:
    batch, losses, gradients = in_float64(), [], []
    for packing in (False, True):
        model = model_in_float64(model_type)
        loss = weighted(contrast(model, batch, packing=packing))
        loss.backward()
        losses.append(loss.detach())
        gradients.append({name: value.grad for name, value in model.named_parameters() if value.grad is not None})
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-12, atol=0)
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[0].items():
        # Gemma's norms compute in float32 whatever comes in, so sums over tokens in another order round differently.
        tolerance = 1e-5 * float(expected.abs().max()) if "gemma" in model_type else 1e-11
        torch.testing.assert_close(gradients[1][name], expected, rtol=0, atol=tolerance, msg=name)


@pytest.mark.parametrize("text_positions", ["original", "contiguous"])
@pytest.mark.parametrize("document_start_id", [2, None])
def test_text_pass_alone(text_positions: Any, document_start_id: int | None) -> None:
    model = model_in_float64("qwen2", 5)
    batch = in_float64(document_start_id=document_start_id)
    more: dict[str, Any] = {"text_positions": text_positions, "all_samples": True}
    expected = text_only_logprobs(model, batch, **more).logp
    found = text_only_logprobs(model, batch, packing=True, **more).logp
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12, equal_nan=True)
    assert bool(expected.isnan().any()) == (document_start_id is None)


@pytest.mark.parametrize("changed", range(len(STRUCTURES)))
def test_no_sample_sees_another(changed: int) -> None:
    """Other tokens and another image in one sample move its own numbers and nobody else's."""
    model, batch = model_in_float64("qwen2"), in_float64()
    ids_BL = batch.input_ids.clone()
    own_L = batch.attention_mask[changed].bool() & ~batch.is_image[changed]
    ids_BL[changed, own_L] = (ids_BL[changed, own_L] + 1) % 150
    assert batch.pixel_values is not None
    pixels = batch.pixel_values.clone()
    first = sum(batch.image_counts[:changed])
    pixels[first : first + batch.image_counts[changed]] += 1
    before = contrast(model, batch, packing=True)
    after = contrast(model, replace(batch, input_ids=ids_BL, pixel_values=pixels), packing=True)
    own = before.sample_index == changed
    for name in ("logp_with", "logp_without"):
        difference = (getattr(before, name) - getattr(after, name)).detach().abs().nan_to_num()
        assert float(difference[~own].max()) < 1e-12, name
    assert float((before.logp_with - after.logp_with).detach().abs()[own].min()) > 1e-6


def test_batches_without_labels_can_be_backpropagated() -> None:
    """A rank that has run out of samples takes part with such a batch."""
    model = tiny_llava("qwen2")
    result = contrast(model, tiny_batch(["bos image text:3", "image text:2"]), packing=True)
    assert result.logp_with.shape == (0,)
    weighted_nll(result.logp_with, torch.zeros(0))[0].backward()
    assert model.model.multi_modal_projector.linear_1.weight.grad is not None


def test_official_is_refused() -> None:
    with pytest.raises(UserError, match="leave packing off"):
        contrast(tiny_llava("qwen2"), tiny_batch(STRUCTURES), fidelity="official", packing=True)


def test_packing_runs_over_fewer_slots() -> None:
    """Else the tests above compare nothing."""
    model, batch = tiny_llava("qwen2"), tiny_batch(STRUCTURES)
    slots: list[int] = []
    model.get_decoder().register_forward_pre_hook(
        lambda _module, _args, inputs: slots.append(inputs["inputs_embeds"][..., 0].numel()), with_kwargs=True
    )
    for packing in (False, True):
        contrast(model, batch, packing=packing)
    assert slots[2:] == [sum_of_text(batch), int(batch.attention_mask.sum())]
    assert slots[0] > 1.5 * slots[2]
    assert slots[1] > 1.5 * slots[3]


def sum_of_text(batch: Batch) -> int:
    """Text up to the last position that predicts a label, in samples with image; one document start per place."""
    total, starts = 0, set()
    for sample, images in enumerate(batch.image_counts):
        if images:
            text_L = batch.attention_mask[sample].bool() & ~batch.is_image[sample]
            labels = batch.supervised[sample].nonzero().flatten().tolist()
            last = max((t for t in range(labels[-1]) if text_L[t]), default=-1)
            total += int(text_L[: last + 1].sum())
            starts |= {label - 1 for label in labels if not text_L[:label].any()}
    return total + len(starts)


def varlen(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    softcap: float | None = None,
    sliding_window: int | None = None,
    *,
    cu_seq_lens_q: Tensor,
    cu_seq_lens_k: Tensor,
    max_length_q: int,
    max_length_k: int,
    **_: Any,
) -> tuple[Tensor, None]:
    """What flash-attention's varlen kernel computes, from what it is told."""
    assert attention_mask is None, "no padding: flash-attention would take a row for one sample"
    rows, _heads, length, _size = query.shape
    place = torch.arange(rows * length)
    segment = torch.bucketize(place, cu_seq_lens_q[1:].long(), right=True)
    assert torch.equal(cu_seq_lens_q, cu_seq_lens_k)
    assert int(cu_seq_lens_q.diff().max()) == max_length_q == max_length_k
    flat = [part.transpose(1, 2).reshape(1, rows * length, part.shape[1], -1).transpose(1, 2) for part in (query, key)]
    value = value.transpose(1, 2).reshape(1, rows * length, value.shape[1], -1).transpose(1, 2)
    seen = (segment[:, None] == segment) & (place <= place[:, None])
    if sliding_window is not None:
        seen &= place > place[:, None] - sliding_window
    output, _ = oracle.literal_attention(module, *flat, value, seen[None, None], scaling, softcap)
    return output.view(rows, length, *output.shape[2:]), None


@pytest.mark.parametrize(("model_type", "window"), [*[(kind, None) for kind in MODEL_TYPES], ("mistral", 5)])
def test_flash_attention_gets_one_row_and_its_boundaries(model_type: ModelType, window: int | None) -> None:
    """A stand-in kernel that believes the boundaries alone; a window is reached in the pass with image only."""
    AttentionInterface.register(FLASH, varlen)
    AttentionMaskInterface.register(FLASH, flash_attention_mask)
    model, batch = model_in_float64(model_type, window), in_float64()
    without = window is None  # the pass without image refuses windows that it cannot count
    expected = contrast(model, batch, without=without)
    model.get_decoder().config._attn_implementation = FLASH
    found = contrast(model, batch, without=without, packing=True)
    torch.testing.assert_close(found.logp_with, expected.logp_with, rtol=0, atol=1e-12)
    if without:
        torch.testing.assert_close(found.logp_without, expected.logp_without, rtol=0, atol=1e-12, equal_nan=True)


def test_flash_attention_with_padded_packed_rows_cannot_happen() -> None:
    config = tiny_text_config("llama")
    config._attn_implementation = "flash_attention_2"
    rows = arrange(torch.arange(6) < torch.tensor([[6], [3], [2]]), 6)
    with pytest.raises(AssertionError, match="packed rows with padding"):
        attention_arguments(config, torch.zeros(2, 6, 4), rows.filled, rows.numbered(), span=0, rows=rows)
    assert packed_row_length(config) > 10**9


@pytest.mark.parametrize("window", [None, 3])
def test_flex_attention_gets_the_same_masks_as_blocks(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Making blocks compiles; here the function that they are made of is mapped over all pairs instead."""

    def dense(seen: Any, rows: int, heads: Any, queries: int, keys: int, device: Any, _compile: bool) -> Tensor:
        assert _compile, "blocks of a long row would be made from a dense mask"
        return create_mask(seen, rows, heads, queries, keys, device=device)

    monkeypatch.setattr(attention_module, "create_block_mask", dense)
    config = tiny_text_config("gemma2", sliding_window=window)
    rows = arrange(torch.arange(6) < torch.tensor([[6], [3], [2], [4]]), 10)
    masks = []
    for kernel in ("sdpa", "flex_attention"):
        config._attn_implementation = kernel
        embeds = torch.zeros(*rows.sample.shape, 4)
        arguments = attention_arguments(config, embeds, rows.filled, rows.numbered(), span=0, rows=rows)
        masks.append(arguments["attention_mask"])
    assert packed_row_length(config) > 10**9
    for kind in ("full_attention", "sliding_attention"):
        assert torch.equal(masks[0][kind], masks[1][kind]), kind
        assert masks[0][kind].any(-1).all(), "also padding sees something"


def test_hidden_states_of_rows() -> None:
    """The pass with image itself: images go to their own samples, though rows change the samples' order."""
    model, batch = model_in_float64("llama"), in_float64()
    rows = arrange(batch.attention_mask.bool(), 40)
    assert list(rows.order) != sorted(rows.order)
    with torch.no_grad():
        packed, padded = hidden_states(model, batch, rows=rows), hidden_states(model, batch)
    sample_N, column_N = batch.attention_mask.nonzero(as_tuple=True)
    torch.testing.assert_close(packed[rows.places(sample_N, column_N)], padded[sample_N, column_N], rtol=0, atol=1e-12)
