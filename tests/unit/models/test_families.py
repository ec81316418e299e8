from __future__ import annotations

from typing import Any

import pytest
from tokenizers import processors
from transformers import AutoConfig

from dpa.errors import ModelError
from dpa.models.families import FAMILIES, family_of, text_rules
from dpa.testing import chat_templates
from dpa.testing.parts import TINY_FAMILIES, TinyFamily, tiny_model_type, tiny_tokenizer

ROW_OF: dict[TinyFamily, str] = {"lab": "qwen2", "phi4_mini": "phi3"}
"""Of the tiny families that are not called as their row is."""


def rules_of(family: TinyFamily, tokenizer: Any | None = None) -> Any:
    tokenizer = tokenizer or tiny_tokenizer(family)
    config = AutoConfig.for_model(tiny_model_type(family))
    return text_rules(family_of(config, tokenizer), tokenizer, 9)


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_recognised_by_facts(family: TinyFamily) -> None:
    config = AutoConfig.for_model(tiny_model_type(family))
    assert family_of(config, tiny_tokenizer(family)).name == ROW_OF.get(family, family)


def test_every_row_has_a_tiny_family() -> None:
    assert {ROW_OF.get(family, family) for family in TINY_FAMILIES} == set(FAMILIES)


def test_multimodal_model_is_no_llm() -> None:
    with pytest.raises(ModelError, match=r"multimodal model itself \(model_type 'gemma3'\).*gemma-3-1b-it"):
        family_of(AutoConfig.for_model("gemma3"), tiny_tokenizer("gemma3"))


def test_unknown_family_lists_the_table_and_names_the_row() -> None:
    with pytest.raises(ModelError) as caught:
        family_of(AutoConfig.for_model("gpt2"), tiny_tokenizer("qwen2"))
    message = str(caught.value)
    assert all(name in message for name in FAMILIES)
    assert "model_types=('gpt2',)" in message


def test_known_type_with_another_chat_format_is_unknown() -> None:
    with pytest.raises(ModelError, match="end-of-turn"):
        family_of(AutoConfig.for_model("gemma2"), tiny_tokenizer("qwen2"))


@pytest.mark.parametrize(
    ("family", "image_token", "grows", "bos", "start", "end_of_turn", "pad"),
    [
        ("qwen2", "<image>", 1, None, "<|endoftext|>", "<|im_end|>", "<|endoftext|>"),
        ("lab", "<image>", 0, None, "<|endoftext|>", "<|im_end|>", "<|endoftext|>"),
        (
            "llama3",
            "<|reserved_special_token_0|>",
            0,
            "<|begin_of_text|>",
            "<|begin_of_text|>",
            "<|eot_id|>",
            "<|finetune_right_pad_id|>",
        ),
        ("qwen3", "<image>", 1, None, "<|endoftext|>", "<|im_end|>", "<|endoftext|>"),
        ("smollm2", "<image>", 1, None, "<|endoftext|>", "<|im_end|>", "<|im_end|>"),
        ("gemma3", "<unused0>", 0, "<bos>", "<bos>", "<end_of_turn>", "<pad>"),
        ("phi3", "<image>", 1, None, "<|endoftext|>", "<|end|>", "<|endoftext|>"),
        ("phi4_mini", "<image>", 1, None, "<|endoftext|>", "<|end|>", "<|endoftext|>"),
        ("phi4", "<|dummy_0|>", 0, None, "<|endoftext|>", "<|im_end|>", "<|dummy_0|>"),
        ("gemma2", "<unused0>", 0, "<bos>", "<bos>", "<end_of_turn>", "<pad>"),
        ("mistral", "<image>", 1, "<s>", "<s>", "</s>", "<unk>"),
        ("llama2", "<image>", 1, "<s>", "<s>", "</s>", "<unk>"),
    ],
)
def test_rules(
    family: TinyFamily, image_token: str, grows: int, bos: str | None, start: str, end_of_turn: str, pad: str
) -> None:
    tokenizer = tiny_tokenizer(family)
    before = dict(tokenizer.get_vocab())
    rules = rules_of(family, tokenizer)
    ids = tokenizer.convert_tokens_to_ids
    assert rules.image_token == image_token
    assert rules.image_token_id == ids(image_token)
    assert len(tokenizer) - len(before) == grows
    assert before.get(image_token, len(before)) == rules.image_token_id, "an unused token keeps its id"
    assert rules.image_tokens == 9
    assert rules.bos_id == (None if bos is None else ids(bos))
    assert rules.document_start_id == ids(start)
    assert rules.end_of_turn == end_of_turn
    assert rules.pad_id == ids(pad) == tokenizer.pad_token_id
    assert tokenizer.chat_template == rules.chat_template


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_placeholders_are_one_id_each_wherever_they_stand(family: TinyFamily) -> None:
    tokenizer = tiny_tokenizer(family)
    rules = rules_of(family, tokenizer)
    ids = tokenizer(f"see {rules.image_token * 3}\nand{rules.image_token}it", add_special_tokens=False)["input_ids"]
    assert ids.count(rules.image_token_id) == 4
    assert rules.image_token not in tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_rules_of_used_tokenizer_are_the_same(family: TinyFamily) -> None:
    tokenizer = tiny_tokenizer(family)
    assert rules_of(family, tokenizer) == rules_of(family, tokenizer)


def test_no_template() -> None:
    tokenizer = tiny_tokenizer("qwen2")
    tokenizer.chat_template = None
    with pytest.raises(ModelError, match="no chat template"):
        rules_of("qwen2", tokenizer)


def test_default_of_several_templates() -> None:
    tokenizer = tiny_tokenizer("qwen2")
    tokenizer.chat_template = {"tool_use": "x", "default": chat_templates.QWEN25}
    assert rules_of("qwen2", tokenizer) == rules_of("qwen2")


def test_bos_family_without_bos() -> None:
    tokenizer = tiny_tokenizer("gemma2")
    tokenizer.bos_token = None
    with pytest.raises(ModelError, match="names none"):
        rules_of("gemma2", tokenizer)


def test_template_that_leaves_bos_to_the_tokenizer() -> None:
    """TinyLlama: the processor would add BOS where training had none, so the template gets it."""
    tokenizer = tiny_tokenizer("llama2")
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + ':' + m['content'] + eos_token }}{% endfor %}"
    rules = rules_of("llama2", tokenizer)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert text == "<s>user:hi</s>"
    assert tokenizer(text, add_special_tokens=False)["input_ids"].count(rules.bos_id) == 1


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_tokenizer_adds_nothing_to_rendered_text(family: TinyFamily) -> None:
    """Else ``processor(text=prompt, images=...)`` puts a second BOS before the template's."""
    tokenizer = tiny_tokenizer(family)
    adds = len(tokenizer("x")["input_ids"]) > len(tokenizer("x", add_special_tokens=False)["input_ids"])
    assert adds == (family in ("llama3", "gemma2", "gemma3", "mistral", "llama2"))
    rules = rules_of(family, tokenizer)
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    ids = tokenizer(text)["input_ids"]
    assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    if rules.bos_id is not None:
        assert ids.count(rules.bos_id) == 1
        assert ids[0] == rules.bos_id


def test_tokenizer_that_adds_an_end_is_silenced() -> None:
    tokenizer = tiny_tokenizer("smollm2")
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", end)]
    )
    rules_of("smollm2", tokenizer)
    assert end not in tokenizer("x")["input_ids"]


# What a family's template writes, and that a prompt is the beginning of the text that was trained


def render(tokenizer: Any, *contents: str, system: str | None = None, prompt: bool = False, **variables: Any) -> str:
    """User and assistant take turns."""
    roles = ("user", "assistant")
    turns = [{"role": roles[place % 2], "content": content} for place, content in enumerate(contents)]
    if system is not None:
        turns.insert(0, {"role": "system", "content": system})
    return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=prompt, **variables))


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_prompt_is_the_beginning_of_the_training_text(family: TinyFamily) -> None:
    """As ids: what the model is given when it is asked is what stood before the answer that it learned."""
    tokenizer = tiny_tokenizer(family)
    rules = rules_of(family, tokenizer)
    for before in (["<image>\nwhat is it?"], ["<image>\nwhat?", "a red circle.", "and there?"]):
        asked, told = (
            tokenizer(text, add_special_tokens=False)["input_ids"]
            for text in (render(tokenizer, *before, prompt=True), render(tokenizer, *before, "a blue square."))
        )
        assert told[: len(asked)] == asked
        assert asked.count(rules.image_token_id) == 1
        end = tokenizer.convert_tokens_to_ids(rules.end_of_turn)
        answer = told[len(asked) : told.index(end, len(asked))]
        assert tokenizer.decode(answer).strip() == "a blue square."


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("qwen2", "<|im_start|>system\nYou are a careful helper.<|im_end|>\n<|im_start|>user\n"),
        ("qwen3", "<|im_start|>user\n"),
        ("llama3", "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nKnowledge ends: 2023\n"),
        ("smollm2", "<|im_start|>system\nYou are small.<|im_end|>\n<|im_start|>user\n"),
        ("gemma2", "<bos><start_of_turn>user\n"),
        ("gemma3", "<bos><start_of_turn>user\n"),
        ("phi3", "<|user|>\n"),
        ("phi4_mini", "<|user|>"),
        ("phi4", "<|im_start|>user<|im_sep|>"),
        ("mistral", "<s> [INST] "),
        ("llama2", "<s>A chat between a curious user"),
    ],
)
def test_what_stands_before_the_first_word(family: TinyFamily, expected: str) -> None:
    tokenizer = tiny_tokenizer(family)
    rules_of(family, tokenizer)
    assert render(tokenizer, "hi").startswith(expected)


def test_system_turn_of_gemma3_is_in_the_users() -> None:
    tokenizer = tiny_tokenizer("gemma3")
    rules_of("gemma3", tokenizer)
    assert render(tokenizer, "<image>\nhi", system="Be brief.") == (
        "<bos><start_of_turn>user\nBe brief.\n\n<unused0>\nhi<end_of_turn>\n"
    )


class TestThoughts:
    """Qwen3's template: where are blocks of thoughts in training, where in the prompt?"""

    def test_default_of_the_original_opens_none_and_training_has_one(self) -> None:
        tokenizer = tiny_tokenizer("qwen3")
        assert render(tokenizer, "hi", prompt=True).endswith("<|im_start|>assistant\n"), "the fixture's problem"
        assert render(tokenizer, "hi", "yes").endswith("assistant\n<think>\n\n</think>\n\nyes<|im_end|>\n")

    def test_pinned(self) -> None:
        tokenizer = tiny_tokenizer("qwen3")
        rules_of("qwen3", tokenizer)
        block = "<|im_start|>assistant\n<think>\n\n</think>\n\n"
        assert render(tokenizer, "hi", prompt=True).endswith(block)
        assert render(tokenizer, "hi", "yes").endswith(f"{block}yes<|im_end|>\n")
        assert render(tokenizer, "hi", prompt=True, enable_thinking=True).endswith("<|im_start|>assistant\n")

    def test_past_answers_have_none_in_training_and_when_served(self) -> None:
        tokenizer = tiny_tokenizer("qwen3")
        rules_of("qwen3", tokenizer)
        text = render(tokenizer, "hi", "yes", "so", "no")
        assert "assistant\nyes<|im_end|>" in text
        assert text.count("<think>") == 1
        assert text.startswith(render(tokenizer, "hi", "yes", "so", prompt=True))

    def test_template_that_never_closes_them(self) -> None:
        tokenizer = tiny_tokenizer("qwen3")
        tokenizer.chat_template = chat_templates.QWEN3_THINKING
        with pytest.raises(ModelError, match=r"always thinks aloud.*instruct version"):
            rules_of("qwen3", tokenizer)

    def test_instruct_version_has_none(self) -> None:
        tokenizer = tiny_tokenizer("qwen3")
        tokenizer.chat_template = chat_templates.LAB
        rules_of("qwen3", tokenizer)
        assert "think" not in render(tokenizer, "hi", "yes")
