"""Surprise against a naive transcription, one caption and one token at a time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from dpa.analyze.conflict.passes import by_length, surprise_of
from dpa.analyze.conflict.tokens import tokens_of
from dpa.models.families import family_of, text_rules
from dpa.models.parts import load_llm, load_tokenizer
from dpa.models.settings import ModelSettings
from dpa.testing.parts import write_tiny_llm
from dpa.testing.tiny_families import TinyFamily
from tests.unit.analyze.conflict.conftest import captions


@pytest.mark.parametrize("family", ["qwen2", "llama3", "gemma2"])
def test_surprise_is_that_of_the_caption_alone_after_the_document_start(tmp_path: Path, family: TinyFamily) -> None:
    settings = ModelSettings(llm=str(write_tiny_llm(tmp_path / "llm", family)))
    llm, tokenizer = load_llm(settings, dtype=torch.float32), load_tokenizer(settings)
    rules = text_rules(family_of(llm.config, tokenizer), tokenizer, 1)
    found, _ = tokens_of(captions(7), tokenizer, rules, max_length=64)
    measured = surprise_of(llm, found, rules, device=torch.device("cpu"), tokens_per_batch=100)
    assert rules.document_start_id is not None
    for caption, surprise in zip(found, measured, strict=True):
        ids = caption.alone.input_ids
        with torch.no_grad():
            whole = llm(torch.tensor([ids])).logits[0].double().log_softmax(dim=-1)
            start = llm(torch.tensor([[rules.document_start_id]])).logits[0, 0].double().log_softmax(dim=-1)
        naive = [-float(whole[place - 1, ids[place]]) for place in range(1, len(ids))]
        if rules.bos_id is None:  # the document start stands alone: the rest of the caption never sees it
            naive = [-float(start[ids[0]]), *naive]
        np.testing.assert_allclose(surprise, naive, atol=2e-5)  # float32 sums in another order


def test_batches_hold_similar_lengths_longest_first_and_stay_within_the_budget() -> None:
    lengths = [5, 90, 7, 6, 30, 31, 5]
    batches = by_length(lengths, 64)
    assert sorted(place for batch in batches for place in batch) == list(range(7))
    assert batches[0] == [1], "longer than the budget: alone"
    assert all(len(batch) * max(lengths[place] for place in batch) <= 64 for batch in batches[1:])
    longest = [max(lengths[place] for place in batch) for batch in batches]
    assert longest == sorted(longest, reverse=True)
