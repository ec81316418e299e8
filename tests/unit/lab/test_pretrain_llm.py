"""The script that makes the LLM: a run of a few steps, its files, its continuation, its schedule."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpa.lab import pretrain_llm
from dpa.lab.pretrain_llm import Outputs, Settings, curriculum, learning_rate, train, wired_share
from dpa.lab.questions import KINDS

TINY = Settings(steps=3, acquaintance=1, batch=2, length=64, layers=4, intermediate=32, warmup=2, easy_steps=1)


@pytest.fixture(autouse=True)
def small_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr(pretrain_llm, "measure", lambda model, tokenizer: {"accuracy": {"mean": 0.0}})
    monkeypatch.setattr(pretrain_llm, "question_accuracy", lambda *_, **__: {"mean": 0.0})


def test_run_writes_a_folder_and_continues_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_state = pretrain_llm._save_state

    def keep_the_second(path: Path, *rest: object) -> None:
        save_state(path, *rest)  # type: ignore[arg-type]
        if rest[2] == 2:
            shutil.copy(path, tmp_path / "second.pt")

    monkeypatch.setattr(pretrain_llm, "_save_state", keep_the_second)
    log = tmp_path / "log.jsonl"
    whole = train(TINY, Outputs(tmp_path / "a", every=2, state=tmp_path / "a.pt", log=log), compiled=False)
    rest = train(TINY, Outputs(tmp_path / "b", every=2, state=tmp_path / "second.pt"), compiled=False)
    for (name, one), other in zip(whole.state_dict().items(), rest.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["step"] for line in lines if "step" in line] == [2, 4]
    assert json.loads((tmp_path / "a" / "measurements.json").read_text())["final"] is True
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.bfloat16)
    for (name, one), other in zip(whole.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(one.to(torch.bfloat16), other), name
    assert len(AutoTokenizer.from_pretrained(tmp_path / "a")) == TINY.vocabulary
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["a", "b"]


def test_schedules() -> None:
    settings = Settings()
    rates = [learning_rate(step, settings) for step in range(settings.steps)]
    assert max(rates) == pytest.approx(settings.learning_rate)
    assert rates.index(max(rates)) in (settings.warmup - 1, settings.warmup)
    assert rates[-1] < 0.02 * settings.learning_rate
    shares = [wired_share(step, settings) for step in range(settings.steps)]
    assert shares[0] == settings.slow
    assert shares[-1] == pytest.approx(0.5)
    assert shares == sorted(shares)


def test_curriculum_grows() -> None:
    settings = Settings()
    stages = [curriculum(step, settings) for step in range(0, settings.steps, 50)]
    objects = [stage.most_objects for stage in stages]
    assert objects == sorted(objects)
    assert objects[-1] == 5
    assert {kind for kind, share in stages[-1].kinds if share > 0} == set(KINDS)
    assert stages[-1].raw_b <= 0.01
