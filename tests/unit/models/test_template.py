from __future__ import annotations

from datetime import datetime
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.exceptions import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from dpa.errors import ModelError
from dpa.models.families import FAMILIES, VICUNA_TEMPLATE
from dpa.models.template import MARK, check_template, serving_template
from dpa.testing import chat_templates
from dpa.testing.parts import tiny_tokenizer

TEMPLATES: dict[str, tuple[str, str]] = {
    "qwen2": (chat_templates.QWEN25, "<image>"),
    "llama3": (chat_templates.LLAMA32, "<|reserved_special_token_0|>"),
    "gemma2": (chat_templates.GEMMA2, "<unused0>"),
    "smollm2": (chat_templates.SMOLLM2, "<image>"),
    "mistral": (chat_templates.MISTRAL, "<image>"),
    "llama2": (VICUNA_TEMPLATE, "<image>"),
    "qwen3": (chat_templates.QWEN3, "<image>"),
    "gemma3": (chat_templates.GEMMA3, "<unused0>"),
    "phi3": (chat_templates.PHI3, "<image>"),
    "phi4_mini": (chat_templates.PHI4_MINI, "<image>"),
    "phi4": (chat_templates.PHI4, "<|dummy_0|>"),
    "lab": (chat_templates.LAB, "<image>"),
}
PINS = FAMILIES["llama3"].pinned


def render(template: str, turns: list[dict[str, Any]], **variables: Any) -> str:
    """As transformers does for tokenizers and processors alike: its sandboxed environment."""
    special = {"bos_token": "<s>", "eos_token": "</s>", **variables}
    texts, _ = render_jinja_template(conversations=[turns], chat_template=template, **special)
    return str(texts[0])


def serving(family: str) -> str:
    template, token = TEMPLATES[family]
    return serving_template(template, token, pinned=PINS if family == "llama3" else None)


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


IMAGE = {"type": "image"}


def text(value: str) -> dict[str, str]:
    return {"type": "text", "text": value}


@pytest.mark.parametrize("family", TEMPLATES)
class TestEveryTemplate:
    def test_typed_and_plain_render_the_same(self, family: str) -> None:
        answer = {"role": "assistant", "content": "red"}
        typed = [user([IMAGE, text("What colour?")]), {**answer, "content": [text("red")]}, user([text("Sure?")])]
        plain = [user("<image>\nWhat colour?"), answer, user("Sure?")]
        for prompt in (True, False):
            assert render(serving(family), typed, add_generation_prompt=prompt) == render(
                serving(family), plain, add_generation_prompt=prompt
            )

    def test_image_is_the_familys_token(self, family: str) -> None:
        token = TEMPLATES[family][1]
        assert f"{token}\nWhat colour?" in render(serving(family), [user([IMAGE, text("What colour?")])])

    def test_text_alone_renders_as_the_original_does(self, family: str) -> None:
        turns = [user("  Is it red?\n"), {"role": "assistant", "content": "yes"}, user("Why <b>?")]
        if family != "gemma2":
            turns.insert(0, {"role": "system", "content": "Be brief."})
        original = TEMPLATES[family][0]
        # date_string is given to both: what the original does without it is the point of pinning
        assert render(serving(family), turns, date_string="1 Jan 2021") == render(
            original, turns, date_string="1 Jan 2021"
        )

    def test_several_images_keep_their_order_and_places(self, family: str) -> None:
        token = TEMPLATES[family][1]
        rendered = render(serving(family), [user([text("Compare "), IMAGE, IMAGE, text("these")])])
        assert f"Compare {token}{token}\nthese" in rendered

    def test_other_part_types_are_refused(self, family: str) -> None:
        with pytest.raises(TemplateError, match="type text or image, not video"):
            render(serving(family), [user([{"type": "video"}, text("what?")])])

    def test_wrapping_twice_is_wrapping_once(self, family: str) -> None:
        once = serving(family)
        assert once.startswith(MARK)
        assert serving_template(once, TEMPLATES[family][1]) == once


@settings(max_examples=60, deadline=None)
@given(
    family=st.sampled_from(sorted(TEMPLATES)),
    question=st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=40).filter(
        lambda s: "<image>" not in s
    ),
    answer=st.text(min_size=1, max_size=20),
)
def test_any_text(family: str, question: str, answer: str) -> None:
    typed = [user([IMAGE, text(question)]), {"role": "assistant", "content": [text(answer)]}]
    plain = [user("<image>\n" + question), {"role": "assistant", "content": answer}]
    template = serving(family)
    if "<image>" in answer:  # a literal mark stands for an image in plain strings alone
        return
    assert render(template, typed) == render(template, plain)


def test_other_keys_of_a_message_survive() -> None:
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "look_closer"}}]}
    turns = [user([IMAGE, text("What is it?")]), call, user("And now?")]
    rendered = render(serving("qwen2"), turns)
    assert "<tool_call>\nlook_closer\n</tool_call>" in rendered
    assert rendered == render(chat_templates.QWEN25, [user("<image>\nWhat is it?"), call, user("And now?")])


def test_tools_reach_the_template() -> None:
    tool = {"type": "function", "function": {"name": "zoom"}}
    texts, _ = render_jinja_template(
        conversations=[[user([IMAGE, text("hm?")])]], chat_template=serving("qwen2"), tools=[tool]
    )
    assert '"name": "zoom"' in texts[0]


def test_the_date_is_pinned() -> None:
    today = datetime.now().strftime("%d %b %Y")
    assert f"Date: {today}" in render(chat_templates.LLAMA32, [user("hi")]), "the fixture must show the problem"
    assert "Date: 26 Jul 2024" in render(serving("llama3"), [user("hi")])
    assert "Date: 1 May 2030" in render(serving("llama3"), [user("hi")], date_string="1 May 2030")


def test_an_unpinned_date_is_refused() -> None:
    with pytest.raises(ModelError, match=r"strftime_now.*pinned"):
        serving_template(chat_templates.LLAMA32, "<image>")


def test_a_pin_that_is_no_date_does_not_pin_the_date() -> None:
    with pytest.raises(ModelError, match="strftime_now"):
        serving_template(chat_templates.LLAMA32, "<image>", pinned={"enable_thinking": False})


def test_leading_bos() -> None:
    template = serving_template(chat_templates.LAB, "<image>", leading=True)
    assert render(template, [user("hi")]) == "<s><|im_start|>user\nhi<|im_end|>\n"


def test_original_that_starts_with_white_space_keeps_it() -> None:
    original = "\n  {{ messages[0]['content'] }}"
    assert render(serving_template(original, "<image>"), [user("x")]) == render(original, [user("x")]) == "\n  x"


def test_image_token_with_a_quote_is_refused() -> None:
    with pytest.raises(ModelError, match="quote"):
        serving_template(chat_templates.LAB, "<i'm>")


class TestCheck:
    def check(self, original: str, template: str, end_of_turn: str = "<|im_end|>") -> None:
        check_template(tiny_tokenizer("lab"), original, template, "<image>", end_of_turn, pinned={})

    def test_good(self) -> None:
        self.check(chat_templates.LAB, serving_template(chat_templates.LAB, "<image>"))

    def test_template_of_another_family(self) -> None:
        with pytest.raises(ModelError, match="after an answer"):
            self.check(chat_templates.LAB, serving_template(chat_templates.LAB, "<image>"), end_of_turn="<|eot_id|>")

    def test_template_that_does_not_render(self) -> None:
        broken = "{{ raise_exception('needs tools') }}"
        with pytest.raises(ModelError, match="needs tools"):
            self.check(broken, serving_template(broken, "<image>"))

    def test_tokenizer_that_adds_to_the_text(self) -> None:
        template = serving_template(chat_templates.GEMMA2, "<unused0>")
        with pytest.raises(ModelError, match="adds tokens to the rendered text"):
            check_template(
                tiny_tokenizer("gemma2"), chat_templates.GEMMA2, template, "<unused0>", "<end_of_turn>", pinned={}
            )

    def test_changed_text(self) -> None:
        with pytest.raises(ModelError, match="with the prelude"):
            self.check(chat_templates.LAB, serving_template(chat_templates.SMOLLM2, "<image>"))

    def test_typed_and_plain_differ(self) -> None:
        with pytest.raises(ModelError, match="typed parts give"):
            self.check(chat_templates.LAB, chat_templates.LAB)  # no newline after an image part
