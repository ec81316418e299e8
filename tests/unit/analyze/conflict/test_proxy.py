"""The brief stage 1."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dpa.analyze.conflict.proxy import adapt, learning_rate_of, steps_of
from dpa.analyze.conflict.settings import ConflictSettings
from dpa.analyze.conflict.tokens import TokenCaption, tokens_of
from dpa.models.digest import digest_of_llm
from dpa.models.families import family_of, text_rules
from dpa.models.parts import load_llm, load_tokenizer
from dpa.models.settings import ModelSettings
from dpa.types import TextRules
from tests.unit.analyze.conflict.conftest import captions

CPU = torch.device("cpu")


def parts(model: ModelSettings, count: int = 12) -> tuple[Any, list[TokenCaption], TextRules]:
    llm, tokenizer = load_llm(model, dtype=torch.float32), load_tokenizer(model)
    rules = text_rules(family_of(llm.config, tokenizer), tokenizer, 1)
    return llm, tokens_of(captions(count), tokenizer, rules, max_length=64)[0], rules


def test_the_first_loss_is_the_llms_own_over_all_tokens_but_a_captions_first(tiny: ModelSettings) -> None:
    llm, found, rules = parts(tiny, 4)
    naive, tokens = 0.0, 0
    for caption in found:
        ids = torch.tensor([caption.alone.input_ids])
        with torch.no_grad():
            logp = llm(ids).logits[0, :-1].double().log_softmax(dim=-1)
        naive -= float(logp.gather(1, ids[0, 1:, None]).sum())
        tokens += ids.shape[1] - 1
    settings = ConflictSettings(adapt_steps=2, captions_per_step=4, rank=2)
    for budget in (4096, 20):  # in one forward, and cut into several
        _, made = adapt(parts(tiny)[0], found, rules, settings, device=CPU, tokens_per_batch=budget, autocast=None)
        assert made.losses[0] == pytest.approx(naive / tokens, rel=1e-5)  # float32
        assert made.tokens == 2 * tokens


def test_training_lowers_the_loss_and_the_same_seed_repeats_it(tiny: ModelSettings) -> None:
    settings = ConflictSettings(adapt_steps=12, captions_per_step=6, rank=4, learning_rate=1e-2)
    runs = []
    for _ in range(2):
        llm, found, rules = parts(tiny)
        before = digest_of_llm(llm)
        model, made = adapt(llm, found, rules, settings, device=CPU, tokens_per_batch=4096, autocast=None)
        runs.append(made)
        assert digest_of_llm(model.unload()) == before, "the LLM's own weights have moved"
    assert runs[0] == runs[1]
    assert runs[0].losses[-1] < 0.9 * runs[0].losses[0]
    assert runs[0].captions == 12


def test_steps_and_learning_rate_by_default() -> None:
    settings = ConflictSettings()
    assert steps_of(settings, 1000) == 64
    assert steps_of(settings, 100) == 25, "four passes, no more"
    assert steps_of(ConflictSettings(adapt_steps=7), 100) == 7
    assert learning_rate_of(settings, 2000) == 5e-4
    assert learning_rate_of(settings, 192) > learning_rate_of(settings, 3584)
    assert learning_rate_of(ConflictSettings(learning_rate=0.1), 192) == 0.1
