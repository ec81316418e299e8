"""The text-only pass: equal to the masked full-length pass, over text tokens alone, without a trace in the model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlavaForConditionalGeneration

from dpa.models.text_pass import TextOnly, text_only_logprobs
from dpa.testing.models import DOCUMENT_START, IMAGE, MODEL_TYPES, ModelType, tiny_batch, tiny_llava
from dpa.types import Batch
from tests.oracles import contrast as oracle

STRUCTURES = [
    "bos text:2 image label:5",  # after BOS
    "image label:3 text:2 label:4",  # image first
    "text:4 label:3",  # no image
    "bos text:3 image text:2 image text:1 label:6 text:1",  # two images, text after the last label
    "image text:1 image label:2 text:3 image text:2 label:4 text:5",  # turns, an image in each
    "text:3 image text:2 label:2",  # in the middle
    "image image label:1",  # two images in a row, nothing else
]
CASES: list[tuple[ModelType, int | None]] = [
    *[(model_type, None) for model_type in MODEL_TYPES],
    *[(model_type, window) for model_type in ("qwen2", "gemma2", "mistral") for window in (3, 9)],
]
FIRST_WITHOUT_TEXT = "image label:4"


def in_float64(batch: Batch) -> Batch:
    return replace(batch, pixel_values=None if batch.pixel_values is None else batch.pixel_values.double())


def model_in_float64(
    model_type: ModelType, window: int | None = None, **settings: Any
) -> LlavaForConditionalGeneration:
    """Over the literal attention: exact also for Gemma-2, whose eager attention rounds to float32."""
    model = tiny_llava(model_type, sliding_window=window, dtype=torch.float64, **settings)
    return oracle.with_literal_attention(model)


def masked_full_length(model: LlavaForConditionalGeneration, batch: Batch) -> Tensor:
    keys_BL = batch.attention_mask.bool() & ~batch.is_image
    with torch.no_grad():
        logits_BLV = oracle.full_logits(model, batch, keys_BL, softcap=True)
    return oracle.at_labels(batch, logits_BLV, oracle.log_softmax)


def logprob_after(llm: Any, context: list[int], label: int) -> float:
    """log p(label | context) by a plain forward over the context alone, positions 0, 1, 2 ..."""
    decoder = llm.get_decoder()
    with torch.no_grad():
        hidden = decoder(
            input_ids=torch.tensor([context]), attention_mask=torch.ones(1, len(context))
        ).last_hidden_state
        logits = hidden[0, -1].double() @ llm.get_output_embeddings().weight.double().T
    return float(torch.log_softmax(logits, dim=-1)[label])


@pytest.mark.parametrize(("model_type", "window"), CASES)
def test_equals_the_masked_full_length_pass(model_type: ModelType, window: int | None) -> None:
    model = model_in_float64(model_type, window)
    batch = oracle.with_likely_labels(model, in_float64(tiny_batch(STRUCTURES)))
    text = text_only_logprobs(model, batch)
    same = oracle.follows_text(batch) & oracle.in_image_samples(batch)
    assert int(same.sum()) == 23
    torch.testing.assert_close(text.logp[same], masked_full_length(model, batch)[same], rtol=0, atol=1e-12)


@pytest.mark.parametrize(("model_type", "window"), CASES)
def test_kernels_in_use_agree(model_type: ModelType, window: int | None) -> None:
    """sdpa, and eager for Gemma-2, in float32 against the literal attention in float64."""
    batch = tiny_batch(STRUCTURES)
    text = text_only_logprobs(tiny_llava(model_type, sliding_window=window), batch)
    expected = text_only_logprobs(model_in_float64(model_type, window), in_float64(batch))
    # These models amplify rounding on purpose (their log-probs reach -20); float64 above shows equality.
    torch.testing.assert_close(text.logp.double(), expected.logp, rtol=0, atol=3e-5, equal_nan=True)


def test_a_window_that_counts_what_is_left_would_fail() -> None:
    """The case of the test above bites: transformers' own window over the compressed row gives other numbers."""
    model, batch = model_in_float64("mistral", 3), in_float64(tiny_batch(["text:4 image label:3"]))
    renumbered = text_only_logprobs(model, batch, text_positions="contiguous").logp
    assert float((text_only_logprobs(model, batch).logp - renumbered).abs().max()) > 1e-2


@pytest.mark.parametrize(("model_type", "window"), [*[(kind, None) for kind in MODEL_TYPES], ("qwen2", 9)])
def test_batch_of_one_equals_batched(model_type: ModelType, window: int | None) -> None:
    """Alone, a row has no padding and its mask is all ones: where jumps in position ids are read as packing."""
    model = model_in_float64(model_type, window)
    together = text_only_logprobs(model, in_float64(tiny_batch(STRUCTURES)), logits=True)
    alone = [text_only_logprobs(model, in_float64(tiny_batch([structure])), logits=True) for structure in STRUCTURES]
    torch.testing.assert_close(together.logp, torch.cat([one.logp for one in alone]), equal_nan=True)
    assert together.logit is not None
    logits = torch.cat([one.logit for one in alone if one.logit is not None])
    torch.testing.assert_close(together.logit, logits, equal_nan=True)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_no_token_is_lost_to_packing_in_a_row_without_padding(attention: Any) -> None:
    model = tiny_llava("llama", attention=attention, dtype=torch.float64)
    batch = in_float64(tiny_batch(["bos text:6 image text:2 label:3"]))
    before = text_only_logprobs(model, batch).logp
    ids_BL = batch.input_ids.clone()
    ids_BL[0, 1] += 1  # a token of the prompt, before the image
    after = text_only_logprobs(model, replace(batch, input_ids=ids_BL)).logp
    assert float((before - after).abs().min()) > 1e-3


def test_label_after_an_image_is_predicted_from_the_text_before_it() -> None:
    model, batch = model_in_float64("qwen2"), in_float64(tiny_batch(["bos text:2 image label:3"]))
    ids = batch.input_ids[0].tolist()
    first = text_only_logprobs(model, batch).logp[0]
    assert float(first) == pytest.approx(logprob_after(model, ids[:3], ids[batch.supervised[0].tolist().index(True)]))


@pytest.mark.parametrize("text_positions", ["original", "contiguous"])
def test_label_with_nothing_before_it_is_predicted_from_a_document_start(text_positions: Any) -> None:
    model = model_in_float64("qwen2")
    batch = in_float64(tiny_batch([FIRST_WITHOUT_TEXT, "image image label:2", "bos image label:2"]))
    logp = text_only_logprobs(model, batch, text_positions=text_positions).logp
    for token, (sample, position) in enumerate(batch.supervised.nonzero().tolist()):
        if token in (0, 4):
            label = int(batch.input_ids[sample, position])
            assert float(logp[token]) == pytest.approx(logprob_after(model, [DOCUMENT_START], label))


def test_document_start_is_seen_by_nobody_else() -> None:
    model, structures = model_in_float64("qwen2"), [FIRST_WITHOUT_TEXT, *STRUCTURES]
    with_start = text_only_logprobs(model, in_float64(tiny_batch(structures)))
    without = text_only_logprobs(model, in_float64(tiny_batch(structures, document_start_id=None)))
    batch = tiny_batch(structures)
    unknown = oracle.in_image_samples(batch) & without.logp.isnan()
    assert unknown.nonzero().flatten().tolist() == [0, 9, 33]  # first labels of the samples that start with their image
    torch.testing.assert_close(with_start.logp[~unknown], without.logp[~unknown], rtol=0, atol=1e-14, equal_nan=True)
    assert not with_start.logp[unknown].isnan().any()


def test_contiguous_positions_are_those_of_the_text_alone() -> None:
    model, batch = model_in_float64("qwen2"), in_float64(tiny_batch(["bos text:3 image text:2 label:3"]))
    ids = batch.input_ids[0][~batch.is_image[0]].tolist()
    contiguous = text_only_logprobs(model, batch, text_positions="contiguous").logp
    expected = [logprob_after(model, ids[:end], ids[end]) for end in (6, 7, 8)]
    torch.testing.assert_close(contiguous, torch.tensor(expected, dtype=torch.float64))
    assert float((contiguous - text_only_logprobs(model, batch).logp).abs().max()) > 1e-3


def test_samples_without_image_are_left_out_unless_asked_for() -> None:
    model, batch = model_in_float64("llama"), in_float64(tiny_batch(STRUCTURES))
    textual = ~oracle.in_image_samples(batch)
    assert text_only_logprobs(model, batch).logp[textual].isnan().all()
    asked = text_only_logprobs(model, batch, all_samples=True).logp
    torch.testing.assert_close(asked[textual], masked_full_length(model, batch)[textual])
    assert not asked.isnan().any()


def test_any_causal_lm_will_do() -> None:
    """The objective ``prior`` reads another LLM, which has never heard of an image token."""
    model, batch = model_in_float64("qwen2"), in_float64(tiny_batch(STRUCTURES))
    config = type(model.config.text_config)(**{**model.config.text_config.to_dict(), "vocab_size": IMAGE})
    llm = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").double().eval()
    llm.model.load_state_dict(model.get_decoder().state_dict() | {"embed_tokens.weight": embeddings(model)[:IMAGE]})
    llm.lm_head.load_state_dict({"weight": model.lm_head.weight[:IMAGE]})
    with torch.no_grad():
        model.lm_head.weight[IMAGE] = -1e3 * model.lm_head.weight[IMAGE].sign()
    logits = text_only_logprobs(model, batch, logits=True).logit
    assert logits is not None
    torch.testing.assert_close(text_only_logprobs(llm, batch, logits=True).logit, logits, equal_nan=True)


def embeddings(model: LlavaForConditionalGeneration) -> Tensor:
    weight: Tensor = model.get_input_embeddings().weight
    return weight


class Spy:
    """Inputs' shapes of every call of a decoder, whether with gradient and in training mode."""

    def __init__(self, model: LlavaForConditionalGeneration) -> None:
        self.shapes: list[tuple[int, ...]] = []
        self.modes: list[tuple[bool, bool]] = []
        model.get_decoder().register_forward_pre_hook(self.look, with_kwargs=True)

    def look(self, module: torch.nn.Module, _args: Any, kwargs: Any) -> None:
        self.shapes.append(tuple(kwargs["inputs_embeds"].shape[:2]))
        self.modes.append((torch.is_grad_enabled(), any(part.training for part in module.modules())))


def test_only_text_before_the_last_label_is_computed() -> None:
    model = tiny_llava("qwen2")
    spy = Spy(model)
    text_only_logprobs(
        model, tiny_batch(["bos text:2 image text:3 label:4 text:9", "text:4 label:30", "bos image label:3"])
    )
    assert spy.shapes == [(2, 1 + 2 + 3 + 4 - 1)]  # one row per sample with image; the last label is no input


def test_document_starts_share_a_row() -> None:
    model = tiny_llava("qwen2")
    spy = Spy(model)
    text_only_logprobs(model, tiny_batch([FIRST_WITHOUT_TEXT] * 5 + ["image label:1"]))
    assert spy.shapes == [(5 + 1, 3)]


@pytest.mark.parametrize("structures", [["text:4 label:3"], ["bos image text:3"]])
def test_nothing_to_do_is_not_done(structures: list[str]) -> None:
    model = tiny_llava("qwen2")
    spy = Spy(model)
    text = text_only_logprobs(model, tiny_batch(structures))
    assert spy.shapes == []
    assert text.logp.isnan().all()


def trained_with_dropout(model_type: ModelType) -> LlavaForConditionalGeneration:
    model = tiny_llava(model_type)
    model.train()
    model.model.vision_tower.eval()
    for layer in model.get_decoder().layers:
        layer.self_attn.attention_dropout = 0.5
        layer.gradient_checkpointing = True
    return model


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_training_mode_changes_nothing_and_is_left_alone(
    model_type: ModelType, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = trained_with_dropout(model_type), tiny_batch(STRUCTURES)
    flags = [module.training for module in model.modules()]
    checkpointed: list[Any] = []
    for layer in model.get_decoder().layers:
        monkeypatch.setattr(layer, "_gradient_checkpointing_func", checkpointed.append, raising=False)
    random_state = torch.get_rng_state()
    text = text_only_logprobs(model, batch)
    assert torch.equal(text.logp.nan_to_num(), text_only_logprobs(tiny_llava(model_type), batch).logp.nan_to_num())
    assert not text.logp.requires_grad
    assert [module.training for module in model.modules()] == flags
    assert len(set(flags)) == 2
    assert checkpointed == []
    assert all(layer.gradient_checkpointing for layer in model.get_decoder().layers)
    assert torch.equal(torch.get_rng_state(), random_state)


def test_flags_come_back_after_an_error() -> None:
    model = tiny_llava("qwen2")
    model.train()
    with pytest.raises(IndexError):
        text_only_logprobs(model, tiny_batch([FIRST_WITHOUT_TEXT], document_start_id=10**6))
    assert all(module.training for module in model.modules())


def test_result_is_float32_for_bf16() -> None:
    text: TextOnly = text_only_logprobs(tiny_llava("qwen2", dtype=torch.bfloat16), tiny_batch(STRUCTURES), logits=True)
    assert text.logp.dtype == torch.float32
    assert text.logit is not None
    assert text.logit.dtype == torch.float32
