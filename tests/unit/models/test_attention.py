"""Masks, windows and kernels of passes over some positions of a batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedConfig

from dpa.errors import ModelError
from dpa.models.attention import attention_arguments, check_length, nothing_seen_is_nothing_added, sliding_window
from dpa.models.vlm import hidden_states
from dpa.testing.models import ModelType, tiny_batch, tiny_llava, tiny_text_config

POSITION_RK = torch.tensor([[0, 1, 6, 7, 8], [5, 6, 0, 0, 0]])
"""Four image tokens were left out of the first row, five of the second; then padding."""
VISIBLE_RK = torch.tensor([[True] * 5, [True, True, False, False, False]])
EMBEDS_RKH = torch.zeros(2, 5, 32)


def config_of(model_type: ModelType, window: int | None = None, attention: str = "sdpa") -> PreTrainedConfig:
    config = tiny_text_config(model_type, sliding_window=window)
    config._attn_implementation = attention
    return config


def arguments(config: PreTrainedConfig, span: int) -> dict[str, Any]:
    return attention_arguments(config, EMBEDS_RKH, VISIBLE_RK, POSITION_RK, span=span)


def seen(window: int | None) -> torch.Tensor:
    """bool [R, K, K], one entry after the other."""
    seen_RKK = torch.zeros(2, 5, 5, dtype=torch.bool)
    for row in range(2):
        for query in range(5):
            for key in range(query + 1):
                distance = int(POSITION_RK[row, query] - POSITION_RK[row, key])
                seen_RKK[row, query, key] = VISIBLE_RK[row, key] and (window is None or distance < window)
    return seen_RKK


@pytest.mark.parametrize(
    ("model_type", "window", "expected"),
    [
        ("qwen2", None, None),
        ("qwen2", 4, 4),
        ("llama", None, None),
        ("gemma2", 6, 6),
        ("mistral", 5, 5),
        ("mistral", None, None),
    ],
)
def test_window_is_read_from_the_configuration(model_type: ModelType, window: int | None, expected: int | None) -> None:
    assert sliding_window(config_of(model_type, window)) == expected


def test_layers_that_cannot_leave_tokens_out_are_refused() -> None:
    config = config_of("qwen2")
    config.layer_types = ["full_attention", "linear_attention", "full_attention"]
    with pytest.raises(ModelError, match="linear_attention"):
        sliding_window(config)


def test_the_mask_is_passed_even_if_it_is_all_ones() -> None:
    passed = attention_arguments(
        config_of("llama"), EMBEDS_RKH, torch.ones(2, 5, dtype=torch.bool), POSITION_RK, span=9
    )
    assert set(passed) == {"attention_mask"}
    assert passed["attention_mask"].tolist() == [[1] * 5] * 2


@pytest.mark.parametrize(("window", "span"), [(9, 9), (20, 9)])
def test_up_to_the_window_a_plain_mask_is_enough(window: int, span: int) -> None:
    assert torch.equal(arguments(config_of("mistral", window), span)["attention_mask"], VISIBLE_RK.long())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("window", [2, 3, 7])
def test_windows_count_original_positions(attention: str, window: int) -> None:
    masks = arguments(config_of("qwen2", window, attention), 9)["attention_mask"]
    alone = arguments(config_of("mistral", window, attention), 9)["attention_mask"]
    for mask, expected in (
        (masks["full_attention"], seen(None)),
        (masks["sliding_attention"], seen(window)),
        (alone, seen(window)),
    ):
        as_bool = mask if mask.dtype == torch.bool else mask == 0
        assert torch.equal(
            as_bool.squeeze(1)[VISIBLE_RK], expected[VISIBLE_RK]
        )  # what padding sees is nobody's business


@pytest.mark.parametrize("attention", ["flash_attention_2", "flash_attention_3"])
def test_flash_attention_gets_boundaries(attention: str) -> None:
    """Where the mask is all ones it is dropped, and the flash path would look for jumps in position ids."""
    passed = arguments(config_of("llama", None, attention), 9)
    assert torch.equal(passed["attention_mask"], VISIBLE_RK.long())
    assert passed["cu_seq_lens_q"].tolist() == passed["cu_seq_lens_k"].tolist() == [0, 5, 10]
    assert passed["cu_seq_lens_q"].dtype == torch.int32
    assert passed["max_length_q"] == passed["max_length_k"] == 5


def test_flash_attention_with_a_window_in_reach_is_refused() -> None:
    with pytest.raises(ModelError, match=r"up to 9 tokens.*window of 4.*sdpa or eager"):
        arguments(config_of("mistral", 4, "flash_attention_2"), 9)
    assert "cu_seq_lens_q" in arguments(config_of("mistral", 9, "flash_attention_2"), 9)


@pytest.mark.parametrize(("model_type", "window"), [("qwen2", None), ("gemma2", 3), ("mistral", 3)])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_who_sees_nothing_gets_nothing(model_type: ModelType, window: int | None, attention: Any) -> None:
    if model_type == "gemma2" and attention == "sdpa":
        attention = "eager"  # its soft-cap is not in sdpa
    decoder = tiny_llava(model_type, attention=attention, sliding_window=window).get_decoder()
    visible = torch.tensor([[False, True, False, True, False, False]])
    position = torch.tensor([[0, 1, 2, 5, 8, 9]])
    read: list[torch.Tensor] = []
    for layer in decoder.layers:
        layer.self_attn.o_proj.register_forward_hook(lambda _module, inputs, _output: read.append(inputs[0]))
    embeds = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(0))
    passed = attention_arguments(decoder.config, embeds, visible, position, span=10)
    with torch.no_grad(), nothing_seen_is_nothing_added(decoder, visible, position):
        decoder(inputs_embeds=embeds, position_ids=position, use_cache=False, **passed)
    local = [0, 4, 5] if window else [0]
    expected = {
        "qwen2": [[0], [0], [0]],
        "gemma2": [local, [0], local],
        "mistral": [local] * 3,
    }[model_type]
    assert [(inputs[0] == 0).all(-1).nonzero().flatten().tolist() for inputs in read] == expected
    assert not any(layer.self_attn.o_proj._forward_pre_hooks for layer in decoder.layers)


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "mistral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_padding_beyond_the_window_is_a_number(model_type: ModelType, dtype: torch.dtype) -> None:
    """Eager's softmax is float32: float64's lowest number is minus infinity there, and a row of those is NaN."""
    model = tiny_llava(model_type, attention="eager", sliding_window=3, dtype=dtype)
    short, long = "text:2 label:3", "text:9 label:9"
    with torch.no_grad():
        together, alone = (hidden_states(model, tiny_batch(batch)) for batch in ([short, long], [short]))
    assert torch.isfinite(together).all()
    torch.testing.assert_close(together[:1, :5], alone, rtol=0, atol=1e-5)


def test_longrope_beyond_its_first_context_is_refused() -> None:
    """transformers chooses one set of frequencies for a whole batch, by its longest sample."""
    config = config_of("phi3")
    check_length(config, 10_000)
    config.rope_parameters = {"rope_type": "longrope", "original_max_position_embeddings": 4096}
    check_length(config, 4096)
    with pytest.raises(ModelError, match=r"4097 tokens.*max_length of the stages to 4096"):
        check_length(config, 4097)
    check_length(config_of("gemma3_text"), 10_000)
