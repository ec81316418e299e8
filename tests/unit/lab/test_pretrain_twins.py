"""What the second training of the lab's LLM reads, holds and learns."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

from dpa.lab.language import SYNONYMS
from dpa.lab.pretrain_llm import ASSETS
from dpa.lab.pretrain_text import Encoder
from dpa.lab.pretrain_twins import HELD, Settings, TwinStream, learning_rate, losses, main, mixture

B_WORDS = {word for words in SYNONYMS.values() for word in words}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    loaded = PreTrainedTokenizerFast.from_pretrained(ASSETS)
    assert isinstance(loaded, PreTrainedTokenizerFast)
    return loaded


@pytest.fixture(scope="module")
def model() -> Qwen2ForCausalLM:
    loaded = Qwen2ForCausalLM.from_pretrained(ASSETS, dtype=torch.float32, attn_implementation="eager")
    assert isinstance(loaded, Qwen2ForCausalLM)
    return loaded


def test_visual_words_of_b_are_learned_and_its_manner_is_held(tokenizer: PreTrainedTokenizerFast) -> None:
    stream = TwinStream(Encoder(tokenizer), Settings(share=1.0, batch=16, length=400))
    ids_BL, weights_BL = stream.batch(0, mixture())
    learned = {str(tokenizer.decode([token])).strip() for token in ids_BL[weights_BL == 1.0].tolist()}
    held = {str(tokenizer.decode([token])).strip() for token in ids_BL[weights_BL == HELD].tolist()}
    assert len(learned & B_WORDS) > 30
    assert held & {"behold", "lo", "pray", "hark"}
    assert not held & {"crimson", "cobalt", "northwest", "petite"}
    again_BL, _ = stream.batch(0, mixture())
    assert torch.equal(ids_BL, again_BL)


def test_without_a_share_nothing_is_held(tokenizer: PreTrainedTokenizerFast) -> None:
    _, weights_BL = TwinStream(Encoder(tokenizer), Settings(share=0.0, batch=8)).batch(1, mixture())
    assert (weights_BL >= 0).all()


def test_losses(model: Qwen2ForCausalLM) -> None:
    ids_BL = torch.randint(10, 900, (2, 12), generator=torch.Generator().manual_seed(0))
    weights_BL = torch.zeros(2, 12)
    weights_BL[0, 7], weights_BL[1, 2] = 1.0, 0.5
    loss, apart = losses(model, model, ids_BL, weights_BL)
    assert apart == 0
    with torch.no_grad():
        logp = torch.log_softmax(model(input_ids=ids_BL).logits.float(), -1)
    expected = -(logp[0, 6, ids_BL[0, 7]] + 0.5 * logp[1, 1, ids_BL[1, 2]]) / 1.5
    torch.testing.assert_close(loss.detach(), expected)
    weights_BL[0, 3:6] = HELD
    again, apart = losses(model, model, ids_BL, weights_BL)
    assert again == loss, "held tokens are not learned"
    assert apart.item() == pytest.approx(0, abs=1e-6)  # float32 log-softmax
    other = Qwen2ForCausalLM(model.config)
    with torch.no_grad():
        q = torch.log_softmax(other(input_ids=ids_BL[:1]).logits[0, 2:5].float(), -1)
    p = logp[0, 2:5]
    torch.testing.assert_close(losses(other, model, ids_BL, weights_BL)[1].detach(), (p.exp() * (p - q)).sum(-1).mean())


def test_rate_ends_at_nothing() -> None:
    settings = Settings(steps=100, warmup=10, learning_rate=1.0)
    rates = [learning_rate(step, settings) for step in range(100)]
    assert rates[0] == 0.1
    assert max(rates) == rates[9] == 0.91
    assert rates[-1] == pytest.approx(0.01)


def test_the_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpa.lab.pretrain_twins.measure", lambda model, tokenizer: {"accuracy": {}})
    monkeypatch.setattr("dpa.lab.pretrain_twins.question_accuracy", lambda *_, **__: {"mean": 0.5})
    log = tmp_path / "log.jsonl"
    options = ["--llm", str(ASSETS), "--out", str(tmp_path / "llm"), "--log", str(log), "--threads", "1"]
    main([*options, "--steps", "2", "--batch", "4", "--every", "1", "--warmup", "1"])
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert [row["step"] for row in rows if "step" in row] == [1, 2]
    assert rows[1]["divergence"] < 1e-3, "nothing has moved yet"
    made = Qwen2ForCausalLM.from_pretrained(tmp_path / "llm")
    old = Qwen2ForCausalLM.from_pretrained(ASSETS)
    assert any(not torch.equal(a, b) for a, b in zip(made.parameters(), old.parameters(), strict=True))
    written = json.loads((tmp_path / "llm" / "measurements.json").read_text())
    assert written["twins"]["steps"] == 2
    assert written["settings"]["steps"] == 5000
