"""The shipped tiny LLM: loads with stock transformers, its tokenizer fits the lab, and it answers from text."""

import json
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2ForCausalLM

from dpa.lab.language import caption
from dpa.lab.pretrain_llm import ASSETS
from dpa.lab.pretrain_text import IMAGE, SPECIAL_TOKENS, Encoder, Mixture, Stream, attribute_words, train_tokenizer
from dpa.lab.questions import KINDS, ask
from dpa.lab.scenes import draw_scene
from dpa.lab.text_eval import perplexity, question_accuracy
from dpa.models.parts import load_tokenizer
from dpa.models.settings import ModelSettings


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return load_tokenizer(ModelSettings(llm=str(ASSETS)))


@pytest.fixture(scope="module")
def model() -> Qwen2ForCausalLM:
    torch.set_num_threads(1)
    loaded = AutoModelForCausalLM.from_pretrained(ASSETS, dtype=torch.float32)
    assert type(loaded) is Qwen2ForCausalLM
    return loaded


def ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_folder_is_complete_and_small() -> None:
    names = {path.name for path in ASSETS.iterdir()}
    assert names >= {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "measurements.json",
    }
    assert sum(path.stat().st_size for path in ASSETS.iterdir()) < 7e6


def test_every_attribute_word_is_one_token(tokenizer: PreTrainedTokenizerFast) -> None:
    for word in attribute_words():
        for text in (word, f" {word}"):
            assert len(ids(tokenizer, text)) == 1, text


def test_special_tokens(tokenizer: PreTrainedTokenizerFast, model: Qwen2ForCausalLM) -> None:
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token == "<|endoftext|>"
    assert tokenizer.bos_token is None
    for token in SPECIAL_TOKENS:
        assert len(ids(tokenizer, token)) == 1
    assert len(tokenizer) == model.config.vocab_size == model.get_input_embeddings().num_embeddings
    assert model.config.vocab_size % 64 == 0
    assert ids(tokenizer, IMAGE)[0] < model.config.vocab_size
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert ids(tokenizer, "red\n") == [*ids(tokenizer, "red"), *ids(tokenizer, "\n")]


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(exclude_categories=("Cs",)), max_size=40))
def test_any_text_survives_the_round_trip(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(ids(tokenizer, text)) == text


def test_template(tokenizer: PreTrainedTokenizerFast) -> None:
    typed = [
        {"role": "system", "content": "be short."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "\nwhat is it?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
        {"role": "user", "content": "sure?"},
    ]
    rendered = tokenizer.apply_chat_template(typed, tokenize=False, add_generation_prompt=True)
    assert rendered == (
        "<|im_start|>system\nbe short.<|im_end|>\n<|im_start|>user\n<image>\nwhat is it?<|im_end|>\n"
        "<|im_start|>assistant\nred<|im_end|>\n<|im_start|>user\nsure?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert "system" not in tokenizer.apply_chat_template(typed[1:], tokenize=False)
    assert ids(tokenizer, rendered).count(ids(tokenizer, IMAGE)[0]) == 1


def test_training_stream_is_what_the_template_writes(tokenizer: PreTrainedTokenizerFast) -> None:
    stream = Stream(Encoder(tokenizer), seed=1, batch=16, length=160)
    ids_BL, weights_BL = stream.batch(3, Mixture(captions=0.0, compact=0.0))
    again_BL, _ = stream.batch(3, Mixture(captions=0.0, compact=0.0))
    assert torch.equal(ids_BL, again_BL)
    for row, weights in zip(ids_BL, weights_BL, strict=True):
        text = tokenizer.decode(row).replace("<|endoftext|>", "")
        turns = [turn.split("\n", 1) for turn in text.split("<|im_start|>")[1:]]
        messages = [
            {"role": role, "content": content.removesuffix("\n").removesuffix("<|im_end|>")} for role, content in turns
        ]
        rendered = tokenizer.apply_chat_template(messages, tokenize=False)
        expected = ids(tokenizer, rendered)[: len(row)]  # a last newline may fall off the row's end
        assert row[: len(expected)].tolist() == expected
        answers = [ids(tokenizer, f"{m['content']}<|im_end|>") for m in messages if m["role"] == "assistant"]
        assert row[weights > 0].tolist() == [token for answer in answers for token in answer]


def test_tokenizer_is_reproducible(tokenizer: PreTrainedTokenizerFast) -> None:
    made = train_tokenizer(len(tokenizer))
    assert made.get_vocab() == tokenizer.get_vocab()


def test_answers_from_text(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    accuracy = question_accuracy(model, tokenizer, scenes=150, per_scene=3, seed=900_001)
    assert accuracy["questions"] > 400
    assert accuracy["mean"] >= 0.9, accuracy
    assert min(accuracy[kind] for kind in KINDS) >= 0.9, accuracy


def test_accuracy_measure_agrees_with_generation(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """A plain chat through ``generate`` answers as often right as the one-pass measure says."""
    right = total = 0
    for index in range(12):
        scene, rng = draw_scene(900_002, index), random.Random(index)
        question = ask(scene, KINDS[index % len(KINDS)], rng)
        if question is None:
            continue
        user = {"role": "user", "content": f"{caption(scene, 'a', rng).text}\n{question.text}"}
        prompt = tokenizer.apply_chat_template([user], add_generation_prompt=True, return_tensors="pt")
        output = model.generate(**prompt, max_new_tokens=8)
        reply = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
        right += reply == question.answer
        total += 1
    assert right >= 0.8 * total


def test_language_a_is_its_prior_and_b_is_not(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    a = perplexity(model, tokenizer, "a", captions=40)
    b = perplexity(model, tokenizer, "b", captions=40)
    assert a["nats_per_token"] < 1.2
    assert b["nats_per_token"] > a["nats_per_token"] + 0.35, "B must be unusual"
    assert b["nats_per_token"] < a["nats_per_token"] + 1.5, "and not unknown, or nothing is learned from it"


def test_measurements_are_written_down() -> None:
    measured = json.loads(Path(ASSETS, "measurements.json").read_text())
    assert measured["final"] is True
    assert measured["accuracy"]["questions"] >= 2000
    assert measured["accuracy"]["mean"] > 0.95
    assert all(measured["accuracy"][kind] >= 0.95 for kind in KINDS)
    assert measured["perplexity_a"]["per_token"] < measured["perplexity_b"]["per_token"]
    assert measured["parameters"] < 3.5e6
