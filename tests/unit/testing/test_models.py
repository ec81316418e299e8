"""Tiny models and batches: the same every time, and what was asked for."""

from __future__ import annotations

import pytest
import torch

from dpa.testing.models import IMAGE_TOKENS, MODEL_TYPES, PAD, ModelType, tiny_batch, tiny_llava, tiny_text_config


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_same_seed_same_weights(model_type: ModelType) -> None:
    before = torch.get_rng_state()
    one, two, other = (tiny_llava(model_type, seed).state_dict() for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert all(not torch.equal(one[name], other[name]) for name, _ in tiny_llava(model_type).named_parameters())


def test_softcaps_of_gemma2_bend() -> None:
    config = tiny_llava("gemma2").config.text_config
    assert config.attn_logit_softcapping == 2.0
    assert config.final_logit_softcapping == 5.0
    assert config._attn_implementation == "eager"


def test_windows_are_where_they_are_asked_for() -> None:
    assert tiny_text_config("qwen2", sliding_window=4).layer_types.count("sliding_attention") == 2
    assert tiny_text_config("mistral", sliding_window=4).sliding_window == 4
    with pytest.raises(ValueError, match="no sliding window"):
        tiny_text_config("llama", sliding_window=4)


def test_batch_has_the_structures_that_were_asked_for() -> None:
    batch = tiny_batch(["bos text:2 image label:3", "image image label:1 text:1 label:2"])
    assert batch.input_ids.shape == (2, 12)
    assert batch.supervised.int().tolist() == [[0] * 7 + [1] * 3 + [0] * 2, [0] * 8 + [1, 0, 1, 1]]
    assert batch.is_image.sum(1).tolist() == [IMAGE_TOKENS, 2 * IMAGE_TOKENS]
    assert batch.attention_mask.sum(1).tolist() == [10, 12]
    assert batch.position_ids.tolist() == [[*range(10), 0, 0], [*range(12)]]
    assert batch.input_ids[0, 10:].tolist() == [PAD, PAD]
    assert batch.image_counts == (1, 2)
    assert batch.pixel_values is not None
    assert batch.pixel_values.shape[0] == 3


def test_a_sample_is_the_same_in_every_batch() -> None:
    alone, among = tiny_batch(["text:2 image label:3"]), tiny_batch(["bos label:1", "text:2 image label:3"])
    assert torch.equal(alone.input_ids[0], among.input_ids[1])
    assert alone.pixel_values is not None
    assert among.pixel_values is not None
    assert torch.equal(alone.pixel_values, among.pixel_values)


def test_unknown_words_are_named() -> None:
    with pytest.raises(ValueError, match="'img'"):
        tiny_batch(["bos img label:2"])
