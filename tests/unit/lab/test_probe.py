"""The probe's truth, and its numbers against a forward by hand."""

from __future__ import annotations

import math
import random

import pytest
import torch

from dpa.lab.language import Language, caption
from dpa.lab.probe import OPENING, PROBE_SEED, ProbeSet, make_probe_set, probe, read_words
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
def test_visual_tokens_spell_the_visual_words(vlm: Vlm, probes: ProbeSet, language: Language) -> None:
    rng = random.Random(f"probe:{PROBE_SEED}:{language}")
    written = [caption(draw_scene(PROBE_SEED, index), language, rng) for index in range(20)]
    said = probes.said[language]
    labels = torch.cat([batch.input_ids[batch.supervised] for batch in said.batches])
    spelled = "".join(vlm.tokenizer.decode([token]) for token in labels[said.visual].tolist())
    assert spelled.replace(" ", "") == "".join(
        one.text[start:end] for one in written for start, end in one.visual_spans
    )


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
