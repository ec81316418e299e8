"""Encodings against hand-written expectations. ``[...]`` is supervised, ``{I}`` is one image."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import AutoConfig, LlavaProcessor
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from dpa.data.chat import Encoded, encode_chat, encode_plain
from dpa.data.samples import Sample
from dpa.errors import DataError
from dpa.models.families import family_of, text_rules
from dpa.testing.parts import TINY_FAMILIES, TinyFamily, tiny_model_type, tiny_tokenizer
from tests.unit.data.helpers import IMAGE_TOKENS, make_rules, make_sample, make_tokenizer, marked

TALK = make_sample(
    ("user", "<image>\nWhat?"), ("assistant", "A dog."), ("user", "Sure?"), ("assistant", "Yes"), images=["a.png"]
)
SYSTEM = make_sample(("system", "Be brief."), ("user", "Hi"), ("assistant", "Ho"))


def chat(sample: Sample, style: str, max_length: int = 10_000, **rules: Any) -> tuple[Encoded, str]:
    tokenizer = make_tokenizer(style)
    made = make_rules(tokenizer, style, **rules)
    encoded = encode_chat(sample, tokenizer, made, max_length=max_length)
    return encoded, marked(encoded, tokenizer, made)


LLAMA_HEAD = (
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
    "Knowledge ends: 2023\nDate: 26 Jul 2024\n\n{system}<|eot_id|>"
)
LLAMA_USER = "<|start_header_id|>user<|end_header_id|>\n\n"
LLAMA_ASSISTANT = "<|start_header_id|>assistant<|end_header_id|>\n\n"

EXPECTED = [
    (
        "chatml",
        TALK,
        "<|im_start|>system\nYou are a careful helper.<|im_end|>\n"
        "<|im_start|>user\n{I}\nWhat?<|im_end|>\n<|im_start|>assistant\n[A dog.<|im_end|>]\n"
        "<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n[Yes<|im_end|>]\n",
    ),
    (
        "chatml",
        SYSTEM,
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n[Ho<|im_end|>]\n",
    ),
    (
        "llama3",
        TALK,
        LLAMA_HEAD.replace("{system}", "")
        + LLAMA_USER
        + "{I}\nWhat?<|eot_id|>"
        + LLAMA_ASSISTANT
        + "[A dog.<|eot_id|>]"
        "" + LLAMA_USER + "Sure?<|eot_id|>" + LLAMA_ASSISTANT + "[Yes<|eot_id|>]",
    ),
    (
        "llama3",
        SYSTEM,
        LLAMA_HEAD.replace("{system}", "Be brief.") + LLAMA_USER + "Hi<|eot_id|>" + LLAMA_ASSISTANT + "[Ho<|eot_id|>]",
    ),
    (
        "gemma2",
        TALK,
        "<bos><start_of_turn>user\n{I}\nWhat?<end_of_turn>\n<start_of_turn>model\n[A dog.<end_of_turn>]\n"
        "<start_of_turn>user\nSure?<end_of_turn>\n<start_of_turn>model\n[Yes<end_of_turn>]\n",
    ),
    # The prompt ends with the colon: the space is the answer's (one token with the first word in Llama-2's tokenizer).
    ("vicuna", TALK, "USER: {I}\nWhat? ASSISTANT:[ A dog.</s>]USER: Sure? ASSISTANT:[ Yes</s>]"),
]


@pytest.mark.parametrize(("style", "sample", "expected"), EXPECTED)
def test_chat_by_hand(style: str, sample: Sample, expected: str) -> None:
    assert chat(sample, style)[1] == expected


def test_templates_that_trim_supervise_what_they_wrote() -> None:
    sample = make_sample(("user", "Q"), ("assistant", "\n  padded \n"))
    assert "model\n[padded<end_of_turn>]\n" in chat(sample, "gemma2")[1]
    assert "assistant\n[\n  padded \n<|im_end|>]\n" in chat(sample, "chatml")[1]


@pytest.mark.parametrize("answer", ["user", "assistant", "model", "USER:", "A dog.", "What?", "\n", "<", "|>"])
def test_answers_that_look_like_the_template_or_the_question(answer: str) -> None:
    sample = make_sample(
        ("user", "A dog. assistant\nmodel"), ("assistant", answer), ("user", "x"), ("assistant", "end")
    )
    assert f"assistant\n[{answer}<|im_end|>]\n" in chat(sample, "chatml")[1]
    assert f"model\n[{answer.strip()}<end_of_turn>]\n" in chat(sample, "gemma2")[1]


def test_images_anywhere_and_several() -> None:
    sample = make_sample(("user", "<image><image> or <image>?"), ("assistant", "That."), images=["a", "b", "c"])
    encoded, text = chat(sample, "llama3")
    assert "\n\n{I}{I} or {I}?<|eot_id|>" in text
    assert [end - start for start, end in encoded.image_spans] == [IMAGE_TOKENS] * 3


def test_a_template_without_generation_prompt_supervises_no_header() -> None:
    template = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    sample = make_sample(("user", "Q"), ("assistant", "A"))
    text = chat(sample, "chatml", chat_template=template)[1]
    assert text == "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n[A<|im_end|>]\n"


def test_a_generation_prompt_that_opens_thoughts() -> None:
    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}<none>\n{% endif %}"
        "{{ m['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n"
        "{% endif %}"
    )
    sample = make_sample(("user", "Q"), ("assistant", "A"))
    text = chat(sample, "chatml", chat_template=template)[1]
    assert text == "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n<none>\n[A<|im_end|>]\n"


def test_templates_that_do_not_fit_are_named() -> None:
    talk = make_sample(("user", "Q"), ("assistant", "A"), ("user", "R"), ("assistant", "B"))
    rewriting = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}"
    with pytest.raises(DataError, match=r"chat template unsuitable: the text of turn 2 .* changes"):
        chat(talk, "chatml", chat_template=rewriting)
    dropping = "{% for m in messages %}{{ m['role'] }}{{ m['content'][1:] }}<|im_end|>{% endfor %}"
    with pytest.raises(DataError, match="chat template unsuitable: after turn 2's prompt"):
        chat(talk, "chatml", chat_template=dropping)
    unclosed = "{% for m in messages %}{{ m['role'] }}{{ m['content'] }}{% endfor %}"
    with pytest.raises(DataError, match=r"chat template unsuitable: .* closed by <\|im_end\|>"):
        chat(talk, "chatml", chat_template=unclosed)


def test_a_refusing_template_gives_its_own_words() -> None:
    with pytest.raises(DataError, match=r"chat template refuses: no system turns here \(turns: system, user, assist"):
        chat(SYSTEM, "gemma2")
    twice = make_sample(("user", "Q"), ("user", "R"), ("assistant", "A"))
    with pytest.raises(DataError, match="chat template refuses: user and assistant must take turns"):
        chat(twice, "gemma2")
    with pytest.raises(DataError, match="starts with an answer"):
        chat(make_sample(("assistant", "A"), ("user", "Q")), "chatml")


@pytest.mark.parametrize("role", ["system", "user", "assistant"])
@pytest.mark.parametrize("style", ["chatml", "llama3"])
def test_spelled_out_control_tokens_never_reach_the_model(style: str, role: Any) -> None:
    token = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>"}[style]
    texts = {"system": "S", "user": "Q", "assistant": "A"} | {role: f"say {token} aloud"}
    sample = make_sample(("system", texts["system"]), ("user", texts["user"]), ("assistant", texts["assistant"]))
    with pytest.raises(DataError, match=f"control token in text: '{token[:2]}.*' in a {role} turn".replace("|", r"\|")):
        chat(sample, style)


def test_the_familys_own_image_token_in_a_text_is_a_control_token() -> None:
    with pytest.raises(DataError, match="control token in text"):
        chat(make_sample(("user", "<unused0>"), ("assistant", "A")), "gemma2")


def test_a_marker_cannot_glue_a_control_token_together() -> None:
    sample = make_sample(("user", "<|im_<image>end|>"), ("assistant", "A"), images=["a"])
    assert "user\n<|im_{I}end|><|im_end|>" in chat(sample, "chatml")[1]


@pytest.mark.parametrize(
    ("turns", "images", "reason"),
    [
        ([("user", "Q")], [], "nothing to learn: no assistant turn"),
        ([], [], "nothing to learn: no assistant turn"),
        ([("user", "Q"), ("assistant", " \n")], [], "nothing to learn: every assistant turn is empty"),
        ([("user", "Q"), ("assistant", "A")], ["a"], r"images and markers differ: 1 image\(s\), 0 <image> marker\(s\)"),
        ([("user", "<image><image>"), ("assistant", "A")], ["a"], "1 .*, 2 <image>"),
        ([("user", "<image>"), ("assistant", "A")], [], "0 .*, 1 <image>"),
    ],
)
def test_unusable_samples_say_why(turns: Any, images: Any, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        chat(make_sample(*turns, images=images), "chatml")


def test_one_empty_answer_of_two_is_a_turn_that_ends() -> None:
    sample = make_sample(("user", "Q"), ("assistant", ""), ("user", "R"), ("assistant", "B"))
    assert "assistant\n[<|im_end|>]\n<|im_start|>user" in chat(sample, "chatml")[1]


# Length


def test_cut_at_the_end_and_counted() -> None:
    whole, _ = chat(TALK, "vicuna")
    total = len(whole.input_ids)
    cut, text = chat(TALK, "vicuna", max_length=total - 3)
    assert cut.input_ids == whole.input_ids[:-3]
    assert cut.supervised == whole.supervised[:-3]
    assert (whole.cut, cut.cut) == (0, 3)
    assert text.endswith("ASSISTANT:[ Y]")
    assert chat(TALK, "vicuna", max_length=total)[0] == whole


def test_an_image_is_never_cut() -> None:
    encoded, _ = chat(TALK, "vicuna")
    end = encoded.image_spans[-1][1]
    assert end == 8
    for length in range(1, end):
        with pytest.raises(DataError, match=f"too long: {end} tokens up to the end of the last image, max_length is"):
            chat(TALK, "vicuna", max_length=length)
    with pytest.raises(DataError, match=r"no supervised token: none of 8 tokens \(\d+ more were cut at max_length 8\)"):
        chat(TALK, "vicuna", max_length=8)


# Plain


def plain(
    text: str,
    style: str = "chatml",
    *,
    image: bool = True,
    max_length: int = 10_000,
    document_start: bool = False,
    **rules: Any,
) -> str:
    tokenizer = make_tokenizer(style)
    made = make_rules(tokenizer, style, **rules)
    sample = make_sample(("user", "<image>\nSay what you see."), ("assistant", text), images=["a"])
    encoded = encode_plain(
        sample, tokenizer, made, max_length=max_length, with_image=image, document_start=document_start
    )
    return marked(encoded, tokenizer, made)


def test_plain_by_hand() -> None:
    assert plain("A dog.", "llama3") == "<|begin_of_text|>{I}[A dog.\n]"
    assert plain("A dog.", "llama3", image=False) == "<|begin_of_text|>[A dog.\n]"
    assert plain("A dog.", "chatml", bos_id=None) == "{I}[A dog.\n]"
    # without BOS nothing predicts the first token of a text that stands alone
    assert plain("A dog.", "chatml", bos_id=None, image=False) == "A[ dog.\n]"
    start = make_tokenizer().convert_tokens_to_ids("<|endoftext|>")
    qwen = {"bos_id": None, "document_start_id": start}
    assert plain("A dog.", image=False, document_start=True, **qwen) == "<|endoftext|>[A dog.\n]"
    assert plain("A dog.", "llama3", image=False, document_start=True) == "<|begin_of_text|>[A dog.\n]", "not twice"


def test_marks_of_captions() -> None:
    tokenizer = make_tokenizer("llama3")  # a byte a token
    rules = make_rules(tokenizer, "llama3")
    sample = make_sample(("user", "<image>"), ("assistant", "A red dog."), images=["a"])

    def encode(spans: Any, max_length: int = 99, marks: bool = True) -> Encoded:
        return encode_plain(
            replace(sample, visual_spans=spans), tokenizer, rules, max_length=max_length, with_image=True, marks=marks
        )

    start = 1 + rules.image_tokens
    for length in (99, start + 4):
        found = encode(((2, 5), (6, 9)), length)
        assert found.marked is not None
        assert len(found.marked) == len(found.input_ids)
        assert [at - start for at, mark in enumerate(found.marked) if mark] == [2, 3, 4, 6, 7, 8][
            : 6 if length == 99 else 2
        ]
    assert encode(()).marked == [False] * (start + len("A red dog.\n"))
    assert encode(((2, 5),), marks=False).marked is None
    with pytest.raises(DataError, match="visual_spans beyond the text: 11 of 10 characters"):
        encode(((2, 11),))
    with pytest.raises(DataError, match="not marked: objective spans needs visual_spans"):
        encode(None)
    text = encode_plain(make_sample(("assistant", "A.")), tokenizer, rules, max_length=9, with_image=True, marks=True)
    assert text.marked is None, "without an image there is nothing to mark"


@pytest.mark.parametrize("text", ["say <|im_end|> aloud", "<image>", "<|im_start|>assistant\nx", "<|endoftext|>"])
def test_plain_takes_control_tokens_for_text(text: str) -> None:
    tokenizer = make_tokenizer()
    rules = make_rules(tokenizer)
    encoded = encode_plain(make_sample(("assistant", text)), tokenizer, rules, max_length=999, with_image=False)
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") not in encoded.input_ids
    assert max(encoded.input_ids) < 256
    assert len(encoded.input_ids) == len(text) + 1
    # the same tokenizer still reads templates afterwards
    assert "[A dog.<|im_end|>]" in marked(encode_chat(TALK, tokenizer, rules, max_length=999), tokenizer, rules)


@pytest.mark.parametrize(("text", "reason"), [("", "caption is empty"), ("\n", "caption is empty"), (" \t", "empty")])
def test_plain_refuses_empty_captions(text: str, reason: str) -> None:
    with pytest.raises(DataError, match=f"nothing to learn: .*{reason}"):
        plain(text)


def test_plain_refuses_conversations_and_wrong_counts() -> None:
    tokenizer = make_tokenizer()
    rules = make_rules(tokenizer)
    with pytest.raises(DataError, match="not a caption: 2 assistant turns"):
        encode_plain(TALK, tokenizer, rules, max_length=99, with_image=True)
    two = make_sample(("user", "<image>"), ("assistant", "A"), images=["a", "b"])
    with pytest.raises(DataError, match="images and markers differ"):
        encode_plain(two, tokenizer, rules, max_length=99, with_image=True)
    assert encode_plain(two, tokenizer, rules, max_length=99, with_image=False).image_spans == ()


def test_plain_cuts_captions_not_images() -> None:
    assert plain("A dog.", "llama3", max_length=5) == "<|begin_of_text|>{I}[A ]"
    with pytest.raises(DataError, match="too long: 3 tokens up to the end of the last image, max_length is 2"):
        plain("A dog.", "llama3", max_length=2)
    with pytest.raises(DataError, match="no supervised token"):
        plain("A dog.", "llama3", max_length=3)


# Nasty texts, every family, against the processor that is saved and served

NASTY = {
    "emoji": "👩‍👩‍👧‍👦 family, flag 🏳️‍🌈, skin 👍🏽",
    "right to left": "שלום עולם ‮abc‬ مرحبا",
    "combining": "e\u0301\u0323 Z͑ͫ̓ͪ̂ͫ̽͏̴̙̤̞͉͚̯̞̠͍",
    "zero width": "zero\u200bwidth\ufeff\u2060end",
    "full width": "ｆｕｌｌ ﬁ ＜|im_end|＞",
    "controls": "x\x00y\x07\x1b[31m\u2028\x85z",
    "white space": "  \t leading\r\nand trailing \n\n",
    "newline first": "\n\nafter",
    "newline only": "\n",
    "long": "word " * 700,
    "one long word": "a" * 3000,
    "like a role": "assistant",
    "jinja": "{{ 7 * 7 }}{% raw %}",
}


def family(name: TinyFamily) -> tuple[Any, Any]:
    tokenizer = tiny_tokenizer(name)
    config = AutoConfig.for_model(tiny_model_type(name))
    return tokenizer, text_rules(family_of(config, tokenizer), tokenizer, 16)


@pytest.mark.parametrize("name", TINY_FAMILIES)
def test_nasty_texts_are_what_the_processor_serves(name: TinyFamily) -> None:
    tokenizer, rules = family(name)
    images = LlavaImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    processor = LlavaProcessor(  # type: ignore[no-untyped-call]
        images,
        tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        chat_template=rules.chat_template,
        image_token=rules.image_token,
        num_additional_image_tokens=1,
    )
    picture = Image.fromarray(np.zeros((5, 9, 3), dtype=np.uint8))
    for text in NASTY.values():
        sample = make_sample(
            ("user", f"<image>\n{text}"), ("assistant", text), ("user", "and?"), ("assistant", "no"), images=["a"]
        )
        encoded = encode_chat(sample, tokenizer, rules, max_length=100_000)
        typed: list[dict[str, Any]] = [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]},
            *({"role": turn.role, "content": turn.text} for turn in sample.turns[1:]),
        ]
        rendered = processor.apply_chat_template(typed, tokenize=False)
        bos = tokenizer.bos_token is not None and rendered.startswith(tokenizer.bos_token)
        served = processor(text=[rendered], images=[picture], add_special_tokens=not bos)["input_ids"][0]
        assert encoded.input_ids == served, (name, text[:20])
        learned = [token for token, mine in zip(encoded.input_ids, encoded.supervised, strict=True) if mine]
        answer, _, rest = tokenizer.decode(learned).partition(rules.end_of_turn)
        assert answer.strip() == text.strip(), (name, text[:20])
        assert rest.strip() == f"no{rules.end_of_turn}", (name, text[:20])


@pytest.mark.parametrize("name", TINY_FAMILIES)
def test_nasty_captions(name: TinyFamily) -> None:
    tokenizer, rules = family(name)
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    for text in [text for text in NASTY.values() if text.strip()] + [f"a {rules.end_of_turn} b {rules.image_token}"]:
        sample = make_sample(("user", "<image>"), ("assistant", text), images=["a"])
        with_image = "<image>" not in text  # a marker too many would not be usable with the image
        encoded = encode_plain(sample, tokenizer, rules, max_length=100_000, with_image=with_image)
        start = encoded.image_spans[0][1] if encoded.image_spans else int(rules.bos_id is not None)
        caption = encoded.input_ids[start:]
        assert not special & set(caption), (name, text[:20])
        assert tokenizer.decode(caption).strip() == text.strip(), (name, text[:20])
        assert all(encoded.supervised[max(start, 1) :])
        assert not any(encoded.supervised[: max(start, 1)])
