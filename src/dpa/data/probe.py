"""A few fixed conversations, as training encodes them: what an exported checkpoint must give to the same words."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from dpa.data.chat import Encoded, encode_chat
from dpa.data.samples import Sample, Turn
from dpa.types import TextRules

_LONGEST = 1_000_000
"""Nothing is cut: a tower with many rows per image is no reason to leave the question out."""

PROBES: tuple[Sample, ...] = (
    Sample(
        "image",
        (Turn("user", "<image>\nWhat is in the picture?"), Turn("assistant", "A small red circle.")),
        ("probe",),
        "probe 1",
    ),
    Sample(
        "dialogue",
        (
            Turn("user", "<image>\nHow many objects?  Count twice:\n1) all\n2) red ones"),
            Turn("assistant", "Three, one of them red."),
            Turn("user", "Sure? Ünïcödé, 日本語, 🦊"),
            Turn("assistant", "Yes."),
        ),
        ("probe",),
        "probe 2",
    ),
    Sample("text", (Turn("user", "Name a colour."), Turn("assistant", "Blue.")), (), "probe 3"),
)
"""Spaces, line breaks, several scripts, two turns, no image: where templates and tokenizers are known to disagree."""


def encode_probe(sample: Sample, tokenizer: Any, rules: TextRules) -> Encoded:
    """As training encodes it.

    Raises:
        DataError: the family's template does not take such a conversation.
    """
    return encode_chat(sample, tokenizer, rules, max_length=_LONGEST)


def probe_digest(tokenizer: Any, rules: TextRules) -> str:
    """sha256 (hex) over ids and labels of all probes."""
    encoded = [encode_probe(sample, tokenizer, rules) for sample in PROBES]
    content = [[item.input_ids, [int(on) for on in item.supervised]] for item in encoded]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
