"""The probe's truth, and its numbers against a forward by hand."""

from __future__ import annotations

import math
import random

import pytest
import torch

from dpa.lab.language import caption
from dpa.lab.probe import OPENING, ProbeSet, make_probe_set, probe, read_words, roc_auc, visual_tokens
from dpa.lab.scenes import draw_scene
from dpa.models.settings import ModelSettings
from dpa.models.vlm import Vlm, build_vlm


@pytest.fixture(scope="module")
def vlm() -> Vlm:
    return build_vlm(ModelSettings.model_validate({"llm": "lab:llm", "vision_tower": "lab:tower"}), image_mode="crop")


@pytest.fixture(scope="module")
def probes(vlm: Vlm) -> ProbeSet:
    return make_probe_set(vlm, scenes=20)


@pytest.mark.parametrize("language", ["a", "b"])
def test_visual_tokens_spell_the_visual_words(vlm: Vlm, language: str) -> None:
    written = caption(draw_scene(1, 2), "a" if language == "a" else "b", random.Random(0))
    ids = vlm.tokenizer(f"{written.text}\n", add_special_tokens=False)["input_ids"]
    truth = visual_tokens(written, vlm.tokenizer)
    said = "".join(vlm.tokenizer.decode([token]) for token, visual in zip(ids, truth, strict=True) if visual)
    expected = " ".join(written.text[start:end] for start, end in written.visual_spans)
    assert said.split() == expected.split()


def test_numbers_are_those_of_a_plain_forward(vlm: Vlm, probes: ProbeSet) -> None:
    said = probes.said["b"]
    words = read_words(vlm.model, said)
    assert len(words.logp_with) == len(said.visual) == len(said.opening)
    assert int(said.opening.sum()) == OPENING * 20
    batch = said.batches[-1]  # the last one is short
    with torch.no_grad():
        logits = vlm.model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, pixel_values=batch.pixel_values
        ).logits
    logp = torch.log_softmax(logits[:, :-1].float(), -1).gather(-1, batch.input_ids[:, 1:, None])[..., 0]
    expected = logp[batch.supervised[:, 1:]]
    torch.testing.assert_close(words.logp_with[-len(expected) :], expected, rtol=1e-4, atol=1e-4)  # other kernels


def test_captions_are_told_apart(vlm: Vlm, probes: ProbeSet) -> None:
    words = read_words(vlm.model, probes.said["a"])
    assert sorted(set(words.segment_ids.tolist())) == list(range(20))


def test_nothing_is_left_behind(vlm: Vlm, probes: ProbeSet) -> None:
    state = torch.get_rng_state()
    vlm.model.train()
    first = probe(vlm.model, probes)
    assert vlm.model.training
    assert torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), state)
    vlm.model.train(False)
    assert first == probe(vlm.model, probes)
    assert all(math.isfinite(value) for value in first.values())
    # an untrained connector shows nothing, whatever the language
    assert 0.3 < first["auc_cmo_b"] < 0.7


def test_auc_by_hand() -> None:
    truth = torch.tensor([True, True, False, False])
    assert roc_auc(torch.tensor([2.0, 3.0, 0.0, 1.0]), truth) == 1
    assert roc_auc(torch.tensor([0.0, 1.0, 2.0, 3.0]), truth) == 0
    assert roc_auc(torch.ones(4), truth) == 0.5
    assert roc_auc(torch.tensor([1.0, 3.0, 1.0, 2.0]), truth) == (0.5 + 0 + 1 + 1) / 4
