"""What differs between LLM families: one explicit row each. A new family is a new row, never a guess from a path.

A family is recognised by two facts that its files state: ``model_type`` of the configuration, and an end-of-turn token
in the tokenizer's vocabulary (SmolLM2 is a ``llama`` that speaks ChatML). The chat format itself is the tokenizer's own
template; :mod:`dpa.models.template` wraps it so that training and serving render one text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from tokenizers import AddedToken
from transformers import PreTrainedConfig

from dpa.errors import ModelError
from dpa.log import get_logger
from dpa.models.template import MARK, check_template, serving_template
from dpa.types import TextRules

_NO_PINS: Mapping[str, str | bool] = MappingProxyType({})

VICUNA_TEMPLATE = (
    "{{- bos_token -}}"
    "{%- if messages[0]['role'] == 'system' -%}{%- set system = messages[0]['content'] -%}"
    "{%- set rest = messages[1:] -%}"
    "{%- else -%}{%- set system = 'A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user\\'s questions.' -%}"
    "{%- set rest = messages -%}{%- endif -%}"
    "{{- system + ' ' -}}"
    "{%- for message in rest -%}"
    "{%- if message['role'] == 'user' -%}{{- 'USER: ' + message['content'] + ' ' -}}"
    "{%- else -%}{{- 'ASSISTANT: ' + message['content'] + eos_token -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}"
)
"""Vicuna v1.1's format, for Llama-2 style tokenizers that come without a template (Vicuna's own do)."""


@dataclass(frozen=True, slots=True)
class Family:
    """One row. Tokens are given as text; ids come from the user's tokenizer."""

    name: str
    model_types: tuple[str, ...]
    end_of_turn: str
    """Closes an assistant turn, is supervised with it, and ends an answer at generation."""
    image_token: str
    """The placeholder. An unused token of the family's vocabulary where there is one; else it is added."""
    has_bos: bool
    """Documents start with the tokenizer's BOS."""
    document_start: str | None = None
    """For families without BOS: the token between documents in pretraining; may stand before the first text token."""
    pad_tokens: tuple[str, ...] = ()
    """Tried in order where the tokenizer names no padding token; then its unknown token, then its end of text."""
    softcap_field: str | None = None
    """Configuration field with the final logits' soft-cap. The LLM's head applies it; LLaVA's head does not, so
    ``vlm.head`` hands it to the objectives. Served greedily, nothing changes: the cap is monotonic."""
    attention: Literal["sdpa", "eager"] = "sdpa"
    """What ``attention: auto`` means. Eager where attention logits have a soft-cap, which sdpa cannot apply."""
    pinned: Mapping[str, str | bool] = field(default_factory=lambda: _NO_PINS)
    """Template variables that get a fixed value unless the caller gives one: otherwise the template writes today's
    date, and what is served tomorrow is not what was trained today; or it opens a block of thoughts that no training
    answer has."""
    template: str | None = None
    """Used only where the tokenizer has no chat template."""
    template_adds: str = "nothing"
    """What the family's own template writes beyond the turns, by default. Documentation; training and serving agree."""


FAMILIES: dict[str, Family] = {
    row.name: row
    for row in (
        Family(
            name="qwen2",
            model_types=("qwen2",),
            end_of_turn="<|im_end|>",
            image_token="<image>",  # not in Qwen's vocabulary: it takes id 151665 of 151936 or more embedding rows
            has_bos=False,
            document_start="<|endoftext|>",
            pad_tokens=("<|endoftext|>",),
            template_adds="Qwen2.5: the system turn 'You are Qwen, created by Alibaba Cloud. ...'; Qwen2: 'You are a "
            "helpful assistant.'; the lab's LLM: nothing",
        ),
        Family(
            name="qwen3",
            model_types=("qwen3",),
            end_of_turn="<|im_end|>",
            image_token="<image>",  # takes id 151669 of 151936 embedding rows
            has_bos=False,
            document_start="<|endoftext|>",
            pad_tokens=("<|endoftext|>",),
            pinned=MappingProxyType({"enable_thinking": False}),
            template_adds="no system turn. Hybrid Qwen3: an empty <think> block before the last answer, which its "
            "prompt writes only with enable_thinking false: pinned, so that prompt and training text agree. "
            "Instruct-2507: nothing",
        ),
        Family(
            name="llama3",
            model_types=("llama",),
            end_of_turn="<|eot_id|>",
            image_token="<|reserved_special_token_0|>",
            has_bos=True,
            pad_tokens=("<|finetune_right_pad_id|>", "<|end_of_text|>"),
            pinned=MappingProxyType({"date_string": "26 Jul 2024"}),
            template_adds="Llama-3.1 and later: a system turn with the knowledge cut-off and a date. 3.1 falls back to "
            "26 Jul 2024 and 3.2 writes today's; both are pinned to 26 Jul 2024 (pass date_string to change it)",
        ),
        Family(
            name="smollm2",
            model_types=("llama",),
            end_of_turn="<|im_end|>",
            image_token="<image>",  # its vocabulary is full: the embeddings grow by one row
            has_bos=False,  # the tokenizer calls <|im_start|> its BOS, yet documents do not start with it
            document_start="<|endoftext|>",
            pad_tokens=("<|endoftext|>",),
            template_adds="a system turn that names SmolLM",
        ),
        Family(
            name="gemma2",
            model_types=("gemma2",),
            end_of_turn="<end_of_turn>",
            image_token="<unused0>",
            has_bos=True,
            pad_tokens=("<pad>",),
            softcap_field="final_logit_softcapping",
            attention="eager",
            template_adds="nothing; it refuses system turns",
        ),
        Family(
            name="gemma3",
            model_types=("gemma3_text",),
            end_of_turn="<end_of_turn>",
            image_token="<unused0>",
            has_bos=True,
            pad_tokens=("<pad>",),
            softcap_field="final_logit_softcapping",  # None in every published one
            template_adds="nothing; a system turn becomes the beginning of the first user turn",
        ),
        Family(
            name="phi3",  # Phi-3, Phi-3.5, Phi-4-mini
            model_types=("phi3",),
            end_of_turn="<|end|>",
            image_token="<image>",  # 32011 of 32064 rows; Phi-4-mini: 200029 of 200064
            has_bos=False,  # Phi-3's <s> is not in its template, Phi-4-mini's BOS is its end of text
            document_start="<|endoftext|>",
            pad_tokens=("<|endoftext|>",),
            template_adds="no system turn; <|endoftext|> after the last turn, which is not supervised",
        ),
        Family(
            name="phi4",
            model_types=("phi3",),
            end_of_turn="<|im_end|>",
            image_token="<|dummy_0|>",
            has_bos=False,
            document_start="<|endoftext|>",
            pad_tokens=("<|endoftext|>",),
            template_adds="nothing",
        ),
        Family(
            name="mistral",
            model_types=("mistral",),
            end_of_turn="</s>",
            image_token="<image>",
            has_bos=True,
            pad_tokens=("<pad>", "<unk>"),
            template_adds="nothing; a system turn becomes the beginning of a user turn",
        ),
        Family(  # last of the llama rows: every sentencepiece llama has </s>
            name="llama2",
            model_types=("llama",),
            end_of_turn="</s>",
            image_token="<image>",
            has_bos=True,
            pad_tokens=("<pad>", "<unk>"),
            template=VICUNA_TEMPLATE,
            template_adds="Vicuna: one sentence that says who is talking; Llama-2-chat: nothing",
        ),
    )
}
"""Rows in the order in which they are tried."""


def table() -> str:
    """The rows as text, for messages."""
    return "; ".join(
        f"{row.name}: model_type {'/'.join(row.model_types)} with {row.end_of_turn}" for row in FAMILIES.values()
    )


def family_of(config: PreTrainedConfig, tokenizer: Any) -> Family:
    """The row of an LLM.

    Args:
        config: the LLM's configuration (the text part of a LLaVA's).
        tokenizer: its tokenizer.

    Raises:
        ModelError: no row fits; the message lists the table and says which row to add.
    """
    vocabulary = tokenizer.get_vocab()
    for row in FAMILIES.values():
        if config.model_type in row.model_types and row.end_of_turn in vocabulary:
            return row
    if config.get_text_config() is not config:
        raise ModelError(
            f"LLM {tokenizer.name_or_path!r} is a multimodal model itself (model_type {config.model_type!r}); give a "
            "text-only LLM, such as google/gemma-3-1b-it of the Gemma-3 family"
        )
    raise ModelError(
        f"LLM {tokenizer.name_or_path!r}: no known family has model_type {config.model_type!r} and its end-of-turn "
        f"token in this tokenizer. Known: {table()}. To add one, give dpa.models.families.FAMILIES a row with "
        f"model_types=({config.model_type!r},), the token that closes an assistant turn (the tokenizer's end of text "
        f"is {tokenizer.eos_token!r}), an unused token for images, and whether documents start with "
        f"{tokenizer.bos_token!r}"
    )


def text_rules(family: Family, tokenizer: Any, tower_tokens: int) -> TextRules:
    """What sequences look like for this LLM with this tower.

    Changes ``tokenizer`` in place: the image token becomes a special token of it (an existing entry keeps its id, a
    missing one is added), the padding token is set, its chat template becomes the serving template, and it no longer
    adds BOS by itself: the template writes it.

    Args:
        family: the tokenizer's row.
        tokenizer: a fast tokenizer.
        tower_tokens: rows that tower and connector give per image.

    Raises:
        ModelError: no chat template, a template that does not fit the family, or a special token that is missing.
    """
    image_token_id = _claim_image_token(family, tokenizer)
    pad_id = _claim_pad_token(family, tokenizer)
    document_start_id = _document_start_id(family, tokenizer)
    original = _original_template(family, tokenizer)
    template = serving_template(
        original, family.image_token, pinned=family.pinned, leading=_missing_bos(family, tokenizer, original)
    )
    _add_nothing_by_itself(tokenizer)
    check_template(tokenizer, original, template, family.image_token, family.end_of_turn, pinned=family.pinned)
    tokenizer.chat_template = template
    return TextRules(
        image_token=family.image_token,
        image_token_id=image_token_id,
        image_tokens=tower_tokens,
        bos_id=document_start_id if family.has_bos else None,
        document_start_id=document_start_id,
        end_of_turn=family.end_of_turn,
        pad_id=pad_id,
        chat_template=template,
    )


def _claim_image_token(family: Family, tokenizer: Any) -> int:
    known = tokenizer.added_tokens_encoder.get(family.image_token)
    if known is None or not tokenizer.added_tokens_decoder[known].special:
        # normalized=False: matched as a unit before any normaliser may touch it
        token = AddedToken(family.image_token, special=True, normalized=False)
        before = len(tokenizer)
        tokenizer.add_tokens([token], special_tokens=True)
        if len(tokenizer) > before:
            get_logger(__name__).info("%s joins the vocabulary of %s as image token", token.content, family.name)
    return int(tokenizer.convert_tokens_to_ids(family.image_token))


def _claim_pad_token(family: Family, tokenizer: Any) -> int:
    if tokenizer.pad_token is None:
        vocabulary = tokenizer.get_vocab()
        candidates = [*family.pad_tokens, tokenizer.unk_token, tokenizer.eos_token, family.end_of_turn]
        tokenizer.pad_token = next(token for token in candidates if token in vocabulary)  # end_of_turn always is
    return int(tokenizer.pad_token_id)


def _document_start_id(family: Family, tokenizer: Any) -> int | None:
    if not family.has_bos:
        known = tokenizer.get_vocab().get(family.document_start)
        return None if known is None else int(known)
    if tokenizer.bos_token_id is None:
        raise ModelError(
            f"LLM {tokenizer.name_or_path!r}: family {family.name} starts documents with a BOS token, but its "
            "tokenizer_config.json names none; add bos_token there"
        )
    return int(tokenizer.bos_token_id)


def _original_template(family: Family, tokenizer: Any) -> str:
    """The tokenizer's own template (of several, the default), else the family's.

    Raises:
        ModelError: there is none.
    """
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    template = template or family.template
    if template is None:
        raise ModelError(
            f"LLM {tokenizer.name_or_path!r} has no chat template: it seems to be a base model. Use the instruct "
            "version, or put a chat_template.jinja beside its tokenizer"
        )
    return str(template)


def _missing_bos(family: Family, tokenizer: Any, template: str) -> bool:
    """Whether the tokenizer puts a BOS before the text of this template.

    Such a template leaves BOS to the tokenizer (TinyLlama's); written into the text it is there once, everywhere.
    """
    if not family.has_bos or template.startswith(MARK):
        return False
    bare: list[int] = tokenizer("x", add_special_tokens=False)["input_ids"]
    added: list[int] = tokenizer("x")["input_ids"]
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "x"}]
    text = tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False)
    return added == [tokenizer.bos_token_id, *bare] and not text.startswith(tokenizer.bos_token)


def _add_nothing_by_itself(tokenizer: Any) -> None:
    """Makes rendered text give the same ids with and without ``add_special_tokens``.

    ``processor(text=prompt, images=...)`` on a rendered prompt, as most evaluation code calls it, would otherwise put a
    second BOS before Llama's and Gemma's: ids that training never saw.
    """
    if tokenizer("x")["input_ids"] != tokenizer("x", add_special_tokens=False)["input_ids"]:
        tokenizer.add_bos_token = False  # makes the tokenizer write its post-processor anew
        tokenizer.add_eos_token = False
