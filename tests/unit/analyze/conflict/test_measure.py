"""The whole measurement: on a tiny LLM, and on the lab, where the order of conflicts is known."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from dpa.analyze.conflict import Caption, Conflict, ConflictSettings, measure_conflict, sample_of
from dpa.analyze.conflict.measure import device_of
from dpa.analyze.conflict.report import write_conflict_report
from dpa.analyze.conflict.text import conflict_text
from dpa.errors import DataError, ModelError, UserError
from dpa.lab.language import caption
from dpa.lab.scenes import draw_scene
from dpa.models.digest import digest_of_part
from dpa.models.lora import attach_lora, save_adapter
from dpa.models.parts import load_llm
from dpa.models.settings import LoraSettings, ModelSettings
from tests.unit.analyze.conflict.conftest import captions

SETTINGS = ConflictSettings(rank=4, adapt_steps=6, captions_per_step=8, learning_rate=1e-2, min_phrase_count=2)


@pytest.fixture(scope="module")
def found(tiny: ModelSettings) -> Conflict:
    odd = Caption("odd", "<b>bold</b> & a red ring <script>alert(1)</script>")
    return measure_conflict(sample_of([*captions(24), odd], "<i>mine</i>"), tiny, SETTINGS, device="cpu")


def test_the_score_is_what_lies_between_llm_and_proxy(found: Conflict) -> None:
    assert found.gap.value == pytest.approx(found.prior_held_out.value - found.proxy_held_out.value)
    assert found.share.value == pytest.approx(found.gap.value / found.prior_held_out.value)
    assert found.gap_per_caption.value == pytest.approx(found.gap.value * found.held_out_tokens / found.held_out)
    assert found.gap.low < found.gap.value < found.gap.high
    assert found.gap.value > 0.1
    assert found.gap_adapted is not None
    assert found.gap_adapted.value > found.gap.value, "captions that the proxy has read"
    assert found.held_out == 13
    assert found.captions == 25


def test_classes_part_the_held_out_tokens_and_the_gap(found: Conflict) -> None:
    assert sum(item.tokens for item in found.classes) == found.held_out_tokens
    assert sum(item.share_of_tokens for item in found.classes) == pytest.approx(1)
    assert sum(item.share_of_gap or 0 for item in found.classes) == pytest.approx(1)
    assert sum(item.gap.value * item.share_of_tokens for item in found.classes) == pytest.approx(found.gap.value)
    assert found.truth == ()


def test_the_same_seed_gives_the_same_numbers_and_leaves_torch_alone(tiny: ModelSettings, found: Conflict) -> None:
    odd = Caption("odd", "<b>bold</b> & a red ring <script>alert(1)</script>")
    torch.manual_seed(5)
    state = torch.get_rng_state()
    again = measure_conflict(sample_of([*captions(24), odd], "<i>mine</i>"), tiny, SETTINGS, device="cpu")
    assert dataclasses.replace(again, seconds=found.seconds) == found
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.are_deterministic_algorithms_enabled()


def test_captions_of_one_text_are_never_on_both_sides(tiny: ModelSettings) -> None:
    doubled = [dataclasses.replace(item, id=f"{item.id}-{copy}") for item in captions(8) for copy in range(3)]
    result = measure_conflict(sample_of(doubled), tiny, SETTINGS, device="cpu")
    assert result.held_out == 12


def test_a_given_proxy_is_measured_on_everything(tiny: ModelSettings, tmp_path: Path) -> None:
    model = attach_lora(load_llm(tiny, dtype=torch.float32), LoraSettings(rank=2, alpha=4), seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05, generator=torch.Generator().manual_seed(1))
    save_adapter(model, tmp_path / "proxy", base=tiny.llm, base_digest=digest_of_part(tiny.llm))
    result = measure_conflict(sample_of(captions(6)), tiny, ConflictSettings(proxy=tmp_path / "proxy"), device="cpu")
    assert result.held_out == result.captions == 6
    assert result.adaptation is None
    assert result.gap_adapted is None
    assert result.gap.value != 0
    assert "given proxy" in result.verdict.warnings[-2]
    with pytest.raises(ModelError, match="nowhere holds no LoRA adapter"):
        measure_conflict(sample_of(captions(6)), tiny, ConflictSettings(proxy=Path("nowhere")), device="cpu")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], r"0 usable captions, 0 different, of 0 records; at least 4"),
        (captions(1), r"1 usable captions, 1 different"),
        ([Caption(str(n), "always the same words") for n in range(9)], r"9 usable captions, 1 different"),
        ([Caption(str(n), " ") for n in range(9)], r"0 usable.* Left out: 9 x nothing to learn"),
    ],
)
def test_too_few_captions_are_refused_with_counts(tiny: ModelSettings, given: list[Caption], message: str) -> None:
    with pytest.raises(DataError, match=message):
        measure_conflict(sample_of(given), tiny, SETTINGS, device="cpu")


def test_unknown_devices_and_llms_are_refused() -> None:
    with pytest.raises(UserError, match=r"device 'gpu'.*choose auto, cpu"):
        device_of("gpu")
    with pytest.raises(ModelError, match=r"\./gone"):
        measure_conflict(sample_of(captions(6)), ModelSettings(llm="./gone"), SETTINGS)


def test_terminal_and_page_say_it_and_escape_the_data(found: Conflict, tmp_path: Path) -> None:
    text = conflict_text(found)
    assert f"{found.gap.value:.3f}" in text
    assert f"verdict: {found.verdict.level}" in text
    assert all(len(line) <= 120 for line in text.splitlines())
    page = tmp_path / "deep" / "conflict.html"
    write_conflict_report(found, page)
    html = page.read_text(encoding="utf-8")
    assert f"{found.gap.value:.3f}" in html
    assert "<i>mine</i>" not in html
    assert "&lt;i&gt;mine&lt;/i&gt;" in html
    assert "<script" not in html
    assert "http" not in html.replace("http-equiv", "")
    assert json.loads(json.dumps(found.to_dict()))["gap"]["value"] == found.gap.value


def lab_captions(percent_b: int, count: int) -> list[Caption]:
    rng = random.Random(f"{percent_b}")
    made = []
    for index in range(count):
        said = caption(draw_scene(7, index), "b" if 100 * (index % 4) < 4 * percent_b else "a", rng)
        made.append(Caption(str(index), said.text, visual_spans=said.visual_spans))
    return made


def test_the_score_orders_the_labs_conflicts() -> None:
    settings = ConflictSettings(adapt_steps=10, captions_per_step=8)
    results = [
        measure_conflict(sample_of(lab_captions(percent, 40)), ModelSettings(), settings, device="cpu")
        for percent in (0, 50, 100)
    ]
    shares = [result.share for result in results]
    assert shares[0].value < shares[1].value < shares[2].value
    assert shares[2].low > shares[0].high, "A and B cannot be mistaken for each other"
    assert np.all([item.name for item in results[2].truth] == ["visual", "linguistic"])
