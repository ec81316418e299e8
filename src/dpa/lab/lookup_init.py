"""First weights under which attention already looks things up.

A small transformer that starts from noise needs tens of thousands of steps until it looks a thing up in its context
instead of naming any value it saw there. Its first weights can have the needed shape instead ("mimetic initialisation",
Trockman and Kolter, 2023; the circuit is the induction head of Olsson et al., 2022). Nothing is known of words or of
the world here, and all of it is trained on afterwards:

* the residual stream is content (the token's embedding) and three slots;
* layer 0: three heads look 1, 2 and 3 tokens back, by their biases alone, and write what stands there into the slots;
* layer 1: one head finds the token whose predecessor equals this one and copies it; three heads find an earlier token
  equal to this one and copy its three slots, that is, what was said about it; two heads ask in addition that the
  token before be equal too (``top left`` is two words) and copy what stood two and three tokens before;
* layer 2: three heads find the token whose predecessor's predecessor equals this one and copy it;
* layers 2 and 3: three heads carry the content of the token six back, which is where a question's last word stands as
  seen from the place where the answer starts.

Content is matched in the slowly turning pairs of the rotary embedding, places in the fast ones.

Legend: D head dimension, H hidden.
"""

from __future__ import annotations

import math
from typing import Any, Final

import torch
from transformers import Qwen2ForCausalLM

_SLOTS: Final = 3
_SLOW_TURN: Final = 0.008
"""Radians per token below which a rotary pair hardly turns within a lab text."""
_FAST_PAIRS: Final = 5
_SHARPNESS: Final = 6.0
"""Attention logits between the sought offset and none, per fast pair."""
_MATCH: Final = 4.0
"""Squared gain of the content match."""
_APART: Final = 2.0
"""How strongly a match shuns its own neighbourhood: a token must not find itself."""
_COPY: Final = 2.0
"""Size of what is copied, in units of the embedding."""
_QUESTION_OFFSET: Final = 6
_REST: Final = 0.05
"""What is left of the other heads' and the MLPs' random output: the stream must not drown in noise at the start."""


class _Wiring:
    """The subspaces of one model, and how a head is set to use them."""

    def __init__(self, model: Qwen2ForCausalLM, deviation: float, generator: torch.Generator) -> None:
        config: Any = model.config
        self.hidden = config.hidden_size
        self.head = self.hidden // config.num_attention_heads
        self.content = self.hidden - _SLOTS * self.head
        if self.content != _SLOTS * self.head:
            raise ValueError(f"{config.num_attention_heads} heads; the wiring needs {2 * _SLOTS}")
        pairs = torch.arange(self.head // 2)
        self.turn = config.rope_parameters["rope_theta"] ** (-2.0 * pairs / self.head)
        slow = [int(pair) for pair in pairs if self.turn[pair] < _SLOW_TURN]
        self.slow = slow + [pair + self.head // 2 for pair in slow]
        self.deviation = deviation
        self.basis = torch.linalg.qr(torch.randn(self.content, self.content, generator=generator))[0]

    def read_content(self, block: int) -> torch.Tensor:
        """[D, H] reader of a third of the content."""
        matrix = torch.zeros(self.head, self.hidden)
        matrix[:, : self.content] = self.basis[block * self.head : (block + 1) * self.head]
        return matrix

    def read_slot(self, slot: int) -> torch.Tensor:
        """[D, H] reader of a slot."""
        matrix = torch.zeros(self.head, self.hidden)
        start = self.content + slot * self.head
        matrix[:, start : start + self.head] = torch.eye(self.head)
        return matrix

    def rows(self, head: int) -> slice:
        return slice(head * self.head, (head + 1) * self.head)

    def look_back(self, attention: Any, head: int, offset: int, pairs: int) -> None:
        """Attend to the token ``offset`` back: constant queries and keys that the rotary embedding turns apart."""
        query, key = attention.q_proj, attention.k_proj
        for projection in (query, key):
            projection.weight[self.rows(head)] *= 0.1
            projection.bias[self.rows(head)] = 0
        radius = math.sqrt(_SHARPNESS * math.sqrt(self.head))
        start, half = head * self.head, self.head // 2
        angle = -offset * self.turn[:pairs]
        key.bias[start : start + pairs] = radius
        query.bias[start : start + pairs] = radius * torch.cos(angle)
        query.bias[start + half : start + half + pairs] = radius * torch.sin(angle)

    def match(self, attention: Any, head: int, query: torch.Tensor, key: torch.Tensor, apart: float) -> None:
        """Attend where ``key`` reads what ``query`` reads here; ``apart`` pushes the match away from here."""
        for projection, reader in ((attention.q_proj, query), (attention.k_proj, key)):
            matrix = torch.zeros(self.head, self.hidden)
            matrix[self.slow] = reader[: len(self.slow)] * math.sqrt(_MATCH)
            projection.weight[self.rows(head)] = matrix
            projection.bias[self.rows(head)] = 0
        push = math.sqrt(apart * math.sqrt(self.head))
        start = head * self.head
        attention.q_proj.bias[start : start + _FAST_PAIRS - 1] = -push
        attention.k_proj.bias[start : start + _FAST_PAIRS - 1] = push

    def copy(self, attention: Any, head: int, source: torch.Tensor, target: torch.Tensor, size: float) -> None:
        """What ``source`` reads is written where ``target`` reads."""
        attention.v_proj.weight[self.rows(head)] = source
        attention.o_proj.weight[:, self.rows(head)] = target.T * (self.deviation * size)


@torch.no_grad()
def wire_lookup(model: Qwen2ForCausalLM, deviation: float, seed: int) -> None:
    """Set the first weights of ``model`` in place; ``deviation`` is the embedding's standard deviation.

    Raises:
        ValueError: if the model does not have six heads (three for content, three for slots).
    """
    generator = torch.Generator().manual_seed(seed)
    wiring = _Wiring(model, deviation, generator)
    embedding = model.model.embed_tokens.weight
    embedding.copy_(torch.randn(embedding.shape, generator=generator) * deviation)
    embedding[:, wiring.content :] *= _REST
    model.model.norm.weight.fill_(2.0)
    for layer in model.model.layers:
        layer.mlp.down_proj.weight *= _REST
        layer.self_attn.o_proj.weight *= _REST
    first, second, third, fourth = (layer.self_attn for layer in model.model.layers[:4])
    for slot in range(_SLOTS):
        wiring.look_back(first, slot, slot + 1, _FAST_PAIRS)
        wiring.copy(first, slot, wiring.read_content(slot), wiring.read_slot(slot), 1 / math.sqrt(2))
        wiring.match(second, 1 + slot, wiring.read_content(0), wiring.read_content(0), _APART)
        wiring.copy(second, 1 + slot, wiring.read_slot(slot), wiring.read_content(slot), _COPY)
        for carrier in (third, fourth):
            wiring.look_back(carrier, slot, _QUESTION_OFFSET, _FAST_PAIRS + 1)
            wiring.copy(carrier, slot, wiring.read_content(slot), wiring.read_content(slot), _COPY / 2)
        wiring.match(third, 3 + slot, wiring.read_content(1), wiring.read_slot(1), 0.0)
        wiring.copy(third, 3 + slot, wiring.read_content(slot), wiring.read_content(slot), _COPY / 2)
    # A pair of words: half of the matching dimensions read this token, half the one before it.
    pair = wiring.read_content(0)
    half = len(wiring.slow) // 2
    pair[half:] = wiring.read_slot(0)[: wiring.head - half]
    for head, slot in ((4, 1), (5, 2)):
        wiring.match(second, head, pair, pair, _APART)
        wiring.copy(second, head, wiring.read_slot(slot), wiring.read_content(slot), _COPY)
    wiring.match(second, 0, wiring.read_content(0), wiring.read_slot(0), 0.0)
    wiring.copy(second, 0, wiring.read_content(1), wiring.read_content(1), _COPY)


@torch.no_grad()
def tie_related_words(embedding: torch.Tensor, vocabulary: dict[str, int]) -> None:
    """Let tokens begin near each other that differ by a space before or an ``s`` or ``es`` behind.

    An answer starts a line, its source in the description stands behind a space; one counts circles and sees a circle.

    ``embedding`` is [V, H] and is changed in place; ``vocabulary`` is the byte-level one, where a space is ``Ġ``.
    """
    for token, index in vocabulary.items():
        if len(token) < 3 or not token.startswith("Ġ"):
            continue
        for relative in (token[1:], f"{token}s", f"{token}es"):
            other = vocabulary.get(relative)
            if other is not None:
                embedding[other] = 0.8 * embedding[index] + 0.6 * embedding[other]


def wired_parameters(model: Qwen2ForCausalLM) -> list[torch.nn.Parameter]:
    """What must move slowly at first, or the wiring is gone before it is used: embeddings, queries and keys."""
    parameters = [model.model.embed_tokens.weight]
    for layer in model.model.layers[:3]:
        parameters += [*layer.self_attn.q_proj.parameters(), *layer.self_attn.k_proj.parameters()]
    return parameters
