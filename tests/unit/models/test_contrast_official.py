"""Fidelity ``official`` against a literal transcription of the reference in float64: full length, full vocabulary."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from dpa.models.contrast import Contrast, contrast
from dpa.objectives import official_mean, official_token_weights, relevance, weighted_nll
from dpa.testing.models import MODEL_TYPES, ModelType, tiny_batch, tiny_llava
from dpa.types import Batch
from tests.oracles import contrast as oracle
from tests.oracles.objectives import official_loss

BOUNDS = {"cmo": (0.05, 0.5), "cal": (1.0, 5.0)}
CASES: list[tuple[ModelType, int | None]] = [
    *[(model_type, None) for model_type in MODEL_TYPES],
    ("qwen2", 5),
    ("gemma2", 5),
    ("mistral", 5),
]


def random_structures(seed: int) -> list[str]:
    """One to five samples: with BOS or not, image first, in the middle, several, none; one to three runs of labels."""
    draw = random.Random(seed)

    def words() -> list[str]:
        sample = draw.choice(
            [["bos"], ["bos", "image"], ["image"], ["text:2", "image"], ["text:3"], ["image", "image"]]
        )
        for _ in range(draw.randint(1, 3)):
            sample += draw.choice([[], ["text:1"], ["text:2"], ["text:1", "image"], ["image"]])
            sample += [f"label:{draw.randint(1, 4)}"]
        return sample + draw.choice([[], ["text:2"]])

    return [" ".join(words()) for _ in range(draw.randint(1, 5))]


def transcription(model: LlavaForConditionalGeneration, batch: Batch, kind: str) -> tuple[Any, Any]:
    minimum, maximum = BOUNDS[kind]
    with torch.no_grad():
        with_BLV, without_BLV = oracle.reference_logits(model, batch)
    labels_BL = oracle.labels_for_reference(batch)
    return official_loss(with_BLV, without_BLV, labels_BL, kind=kind, minimum=minimum, maximum=maximum)


def ours(result: Contrast, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss, weights [N]) as the training step makes them."""
    minimum, maximum = BOUNDS[kind]
    read = result.official
    assert read is not None
    values_M = relevance(
        kind, read.logp_with, read.logp_without, logit_with=read.logit_with, logit_without=read.logit_without
    )
    weights_N = official_token_weights(
        values_M, read.positions, read.supervised, read.total, minimum=minimum, maximum=maximum
    )
    return official_mean(*weighted_nll(result.logp_with, weights_N)), weights_N


@pytest.mark.parametrize("kind", ["cmo", "cal"])
@pytest.mark.parametrize(("model_type", "window"), CASES)
def test_loss_and_weights_are_the_references(model_type: ModelType, window: int | None, kind: str) -> None:
    model = oracle.with_literal_attention(tiny_llava(model_type, sliding_window=window, dtype=torch.float64))
    worst, spread = 0.0, []
    for seed in range(6):
        batch = oracle.with_likely_labels(model, tiny_batch(random_structures(seed), seed))
        result = contrast(model, batch, fidelity="official", logits=True)
        loss, weights_N = ours(result, kind)
        expected_loss, expected_S = transcription(model, batch, kind)
        expected_N = expected_S[batch.supervised[:, 1:].flatten()]
        worst = max(worst, float((weights_N - expected_N).abs().max()), float((loss - expected_loss).detach().abs()))
        spread += expected_N.tolist()
    print(f"official {kind} on {model_type}, window {window}: maximal difference {worst:.1e}")
    assert worst < 1e-12
    assert float(torch.tensor(spread).std()) > 0.01


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_kernels_in_use_agree(model_type: ModelType) -> None:
    """sdpa, and eager for Gemma-2, in float32; image first and no BOS among the samples."""
    literal = oracle.with_literal_attention(tiny_llava(model_type, dtype=torch.float64))
    for seed in range(3):
        batch = oracle.with_likely_labels(literal, tiny_batch([*random_structures(seed), "image label:3"], seed))
        loss, weights_N = ours(contrast(tiny_llava(model_type), batch, fidelity="official", logits=True), "cmo")
        expected_loss, expected_S = transcription(literal, batch, "cmo")
        expected_N = expected_S[batch.supervised[:, 1:].flatten()]
        torch.testing.assert_close(weights_N.double(), expected_N, rtol=0, atol=1e-5)
        torch.testing.assert_close(loss.double(), expected_loss, rtol=0, atol=1e-5)


def test_the_last_image_row_leaks_its_patch_as_in_the_reference() -> None:
    """method.md, row "label that directly follows the image": official depends on the pixels there, exact does not."""
    model, batch = tiny_llava("qwen2"), tiny_batch(["bos image label:3"])
    assert batch.pixel_values is not None
    other = replace(batch, pixel_values=batch.pixel_values.flip(-1))
    for fidelity, leaks in (("official", [True, False, False]), ("exact", [False] * 3)):
        first, second = (contrast(model, one, fidelity=fidelity).logp_without for one in (batch, other))  # type: ignore[arg-type]
        assert first is not None
        assert second is not None
        assert (first != second).tolist() == leaks


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_an_image_row_with_nothing_before_it_does_not_see_the_future(attention: Any) -> None:
    model = tiny_llava("qwen2", attention=attention)
    batch = tiny_batch(["image label:4"])
    ids_BL = batch.input_ids.clone()
    ids_BL[0, -3:] += 1
    first, second = (
        contrast(model, one, fidelity="official").logp_without for one in (batch, replace(batch, input_ids=ids_BL))
    )
    assert first is not None
    assert second is not None
    assert not first.isnan().any()
    assert float(first[0]) == float(second[0])
    assert (first[1:] != second[1:]).all()


def test_kernels_agree_where_nothing_is_seen() -> None:
    batch = tiny_batch(["image label:4", "image image label:2", "bos image label:2"])
    eager, sdpa = (
        contrast(tiny_llava("qwen2", attention=attention), batch, fidelity="official").logp_without
        for attention in ("eager", "sdpa")
    )
    assert eager is not None
    torch.testing.assert_close(eager, sdpa, rtol=0, atol=1e-5)


def test_samples_without_image_have_no_relevance_at_all() -> None:
    for structures in (["text:3 label:4", "bos text:1 label:2"], ["text:3 label:4", "bos image label:3"]):
        result = contrast(tiny_llava("llama"), tiny_batch(structures), fidelity="official", logits=True)
        assert result.logp_without is not None
        assert result.logit_with is not None
        assert result.logit_without is not None
        textual = ~result.has_image
        assert torch.equal(result.logp_with[textual], result.logp_without[textual])
        assert torch.equal(result.logit_with[textual], result.logit_without[textual])


def test_final_softcap_is_left_out() -> None:
    batch = tiny_batch(["bos text:3 image text:1 label:4"])
    model = tiny_llava("gemma2")
    official = contrast(model, batch, fidelity="official", logits=True)
    exact = contrast(model, batch, logits=True)
    assert official.logit_with is not None
    assert exact.logit_with is not None
    cap = model.config.text_config.final_logit_softcapping
    torch.testing.assert_close(cap * torch.tanh(official.logit_with / cap), exact.logit_with)
    assert not torch.allclose(official.logp_with, exact.logp_with, atol=1e-2)


def test_neighbours_of_labels_are_read_across_samples() -> None:
    """Two rows of nine positions, so eight shifted ones each; the first row's last label touches the second row."""
    batch = tiny_batch(["bos image text:3 label:1", "bos label:2 text:6"])
    read = contrast(tiny_llava("qwen2"), batch, fidelity="official").official
    assert read is not None
    assert read.total == 16
    assert read.positions.tolist() == [6, 7, 8, 9, 10]
    assert read.supervised.tolist() == [False, True, True, True, False]


def test_a_wider_window_reads_further_neighbours() -> None:
    batch = tiny_batch(["bos image text:6 label:1 text:5"])
    read = contrast(tiny_llava("qwen2"), batch, fidelity="official", window=5).official
    assert read is not None
    assert read.positions.tolist() == [8, 9, 10, 11, 12]


def test_padding_has_no_relevance() -> None:
    """The reference's padding is zeros in both passes. It is read where a row's first label lies at position 1."""
    batch = tiny_batch(["bos image label:2", "bos label:9"])
    read = contrast(tiny_llava("qwen2"), batch, fidelity="official", logits=True).official
    assert read is not None
    assert read.logp_without is not None
    assert read.logit_with is not None
    assert read.logit_without is not None
    last_of_first_row = read.positions.tolist().index(8)
    assert torch.equal(read.logp_with[last_of_first_row], read.logp_without[last_of_first_row])
    assert torch.equal(read.logit_with[last_of_first_row], read.logit_without[last_of_first_row])


def test_only_what_is_read_is_computed() -> None:
    """Samples without image take no part, and of an image only the rows at which something is read."""
    model, shapes = tiny_llava("qwen2"), []
    model.get_decoder().register_forward_pre_hook(
        lambda _module, _args, kwargs: shapes.append(tuple(kwargs["inputs_embeds"].shape[:2])), with_kwargs=True
    )
    batch = tiny_batch(["bos text:2 image text:3 label:4 text:9", "bos image label:5 text:1", "text:4 label:30"])
    contrast(model, batch, fidelity="official")
    text_up_to_the_last_neighbour = 1 + 2 + 3 + 4
    assert shapes == [(2, text_up_to_the_last_neighbour), tuple(batch.input_ids.shape)]
