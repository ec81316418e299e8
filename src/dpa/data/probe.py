"""A few fixed conversations, as training encodes them: what an exported checkpoint must give to the same words."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from dpa.data.chat import Encoded, encode_chat
from dpa.data.samples import Sample, Turn
from dpa.errors import DataError
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


def encode_probes(tokenizer: Any, rules: TextRules) -> list[tuple[Sample, Encoded]]:
    """The probes as training encodes them, without those that the family's template refuses (a sample of their kind
    would have been left out of training too)."""
    found = []
    for sample in PROBES:
        try:
            found.append((sample, encode_chat(sample, tokenizer, rules, max_length=_LONGEST)))
        except DataError:
            continue
    return found


def probe_digest(tokenizer: Any, rules: TextRules) -> str | None:
    """sha256 (hex) over ids and labels of the probes; None where the template takes none of them."""
    content = [
        [sample.id, encoded.input_ids, [int(on) for on in encoded.supervised]]
        for sample, encoded in encode_probes(tokenizer, rules)
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest() if content else None
