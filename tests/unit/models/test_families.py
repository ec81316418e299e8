from __future__ import annotations

from typing import Any

import pytest
from tokenizers import processors
from transformers import AutoConfig

from dpa.errors import ModelError
from dpa.models.families import FAMILIES, family_of, text_rules
from dpa.testing import chat_templates
from dpa.testing.parts import TINY_FAMILIES, TinyFamily, tiny_tokenizer

MODEL_TYPE = {"qwen2": "qwen2", "lab": "qwen2", "gemma2": "gemma2", "mistral": "mistral"}


def rules_of(family: TinyFamily, tokenizer: Any | None = None) -> Any:
    tokenizer = tokenizer or tiny_tokenizer(family)
    config = AutoConfig.for_model(MODEL_TYPE.get(family, "llama"))
    return text_rules(family_of(config, tokenizer), tokenizer, 9)


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_recognised_by_facts(family: TinyFamily) -> None:
    config = AutoConfig.for_model(MODEL_TYPE.get(family, "llama"))
    assert family_of(config, tiny_tokenizer(family)).name == ("qwen2" if family == "lab" else family)


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
        ("smollm2", "<image>", 1, None, "<|endoftext|>", "<|im_end|>", "<|im_end|>"),
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
    assert adds == (family in ("llama3", "gemma2", "mistral", "llama2"))
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
