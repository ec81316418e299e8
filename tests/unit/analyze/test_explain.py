"""Explanations against transformers' own forward, the naive formulas, and what users do wrong."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

from dpa.analyze.explain import Explanation, explain, health_of, name_of
from dpa.errors import DataError, ModelError, UserError
from dpa.models.digest import digest_of_part
from dpa.models.lora import attach_lora, save_adapter
from dpa.models.parts import load_llm
from dpa.models.settings import LoraSettings, ModelSettings
from dpa.testing.llava_hf import write_tiny_llava_hf
from tests.checkpoints import write_tiny_checkpoint

CAPTION = "a small red circle, naïve 日本語 🦊 left of x"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("explain") / "run")


@pytest.fixture(scope="module")
def picture(checkpoint: Path) -> Path:
    return checkpoint.parent / "picture.png"


def stock_logp(checkpoint: Path, picture: Path, text: str, start: str) -> list[float]:
    """Log-probabilities of what follows ``start`` in ``text``, by transformers alone."""
    processor: Any = AutoProcessor.from_pretrained(checkpoint, backend="pil")  # type: ignore[no-untyped-call]
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32).eval()
    image = Image.open(picture).convert("RGB")
    inputs = processor(text=text, images=image, return_tensors="pt", add_special_tokens=False)
    before = processor(text=start, images=image, return_tensors="pt", add_special_tokens=False)["input_ids"].shape[1]
    with torch.no_grad():
        logp_TV = model(**inputs).logits[0].log_softmax(-1)
    ids = inputs["input_ids"][0].tolist()
    return [float(logp_TV[place - 1, ids[place]]) for place in range(before, len(ids))]


def naive_weights(relevance: Sequence[float], low: float, high: float) -> list[float]:
    clamped = [min(max(value, low), high) for value in relevance]
    windows = [clamped[max(0, place - 1) : place + 2] for place in range(len(clamped))]
    return [sum(window) / len(window) for window in windows]


def test_caption_is_what_transformers_says(checkpoint: Path, picture: Path) -> None:
    found = explain(checkpoint, picture, CAPTION)
    assert found.text == CAPTION + "\n"
    assert "" in [token.text for token in found.tokens]  # parts of the fox
    processor: Any = AutoProcessor.from_pretrained(checkpoint, backend="pil")  # type: ignore[no-untyped-call]
    expected = stock_logp(checkpoint, picture, f"{processor.image_token}{CAPTION}\n", processor.image_token)
    assert [token.logp_with for token in found.tokens] == pytest.approx(expected, abs=1e-4)  # float32, other order
    # without the image: the LLM on the caption alone; its first token follows the document's start
    llm = AutoModelForCausalLM.from_pretrained(checkpoint.parent / "llm", dtype=torch.float32).eval()
    ids = processor.tokenizer(CAPTION + "\n", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logp_TV = llm(torch.tensor([ids])).logits[0].log_softmax(-1)
    blind = [float(logp_TV[place - 1, ids[place]]) for place in range(1, len(ids))]
    assert [token.logp_without for token in found.tokens[1:]] == pytest.approx(blind, abs=1e-4)
    values = [math.exp(token.logp_with) - math.exp(token.logp_without or 0) for token in found.tokens]
    assert [token.relevance for token in found.tokens] == pytest.approx(values, abs=1e-6)
    assert [token.weight for token in found.tokens] == pytest.approx(naive_weights(values, 0.05, 0.5), abs=1e-6)
    health = found.health
    assert health.mean_relevance == pytest.approx(sum(values) / len(values), abs=1e-6)
    at_low = sum(weight <= 0.05 + 1e-6 for weight in naive_weights(values, 0.05, 0.5))
    assert health.share_at_minimum == pytest.approx(at_low / len(values))
    assert health.auc is None


def test_answer_in_the_chat_template(checkpoint: Path, picture: Path) -> None:
    found = explain(checkpoint, picture, "red.", prompt="what colour?", kind="cal")
    processor: Any = AutoProcessor.from_pretrained(checkpoint, backend="pil")  # type: ignore[no-untyped-call]
    user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what colour?"}]}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "red."}]}
    start = processor.apply_chat_template([user], add_generation_prompt=True, tokenize=False)
    whole = processor.apply_chat_template([user, answer], tokenize=False)
    expected = stock_logp(checkpoint, picture, whole, start)
    given = [token.logp_with for token in found.tokens]
    assert given == pytest.approx(expected[: len(given)], abs=1e-4)  # the template goes on after the end of turn
    assert found.text == "red.<|im_end|>"
    assert found.prompts == ("what colour?",)
    assert (found.rule.minimum, found.rule.maximum) == (1.0, 5.0)
    assert json.loads(json.dumps(found.to_dict()))["tokens"][0]["logp_with"] == given[0]


def test_truth_and_pooling(checkpoint: Path, picture: Path) -> None:
    text = "a red ring"
    found = explain(checkpoint, picture, text, visual_spans=((2, 5),), name="mine")
    assert "".join(token.text for token in found.tokens if token.visual).strip() == "red"
    assert found.tokens[-1].visual is None  # the newline is no word
    assert found.health.auc is not None
    assert found.checkpoint == "mine"
    other = explain(checkpoint, picture, text, maximum=0.4)
    assert health_of([found, found]).tokens == 2 * found.health.tokens
    with pytest.raises(UserError, match="2 rules"):
        health_of([found, other])


def test_checkpoints_of_llava_hf(tmp_path: Path, picture: Path) -> None:
    folder = write_tiny_llava_hf(tmp_path / "llava")
    found = explain(folder, picture, "a red ring", prompt="what is it?", kind="prior")
    assert found.text.strip().startswith("a red ring")
    assert found.image_mode == "crop"
    assert all(token.relevance is not None and 0 <= token.relevance <= 1 for token in found.tokens)


def write_adapter(folder: Path, llm: Path, *, rank: int = 2) -> Path:
    model = attach_lora(load_llm(ModelSettings(llm=str(llm)), dtype=torch.float32), LoraSettings(rank=rank), seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(len(name)))
    save_adapter(model, folder, base=str(llm), base_digest=digest_of_part(str(llm)))
    return folder


def test_a_proxy_is_merged_into_both_passes(checkpoint: Path, picture: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "run" / "proxy", checkpoint.parent / "llm")
    plain, merged = (explain(checkpoint, picture, CAPTION, proxy=proxy) for proxy in (None, adapter.parent))
    assert merged.checkpoint.endswith("+ proxy")
    for column in ("logp_with", "logp_without"):
        pairs = [(getattr(a, column), getattr(b, column)) for a, b in zip(plain.tokens, merged.tokens, strict=True)]
        assert max(abs(a - b) for a, b in pairs) > 1e-2


def test_the_proxy_of_another_llm_is_refused(checkpoint: Path, picture: Path, tmp_path: Path) -> None:
    # of the same shapes: only the manifests of the two runs can tell
    own = write_adapter(tmp_path / "qwen" / "proxy", checkpoint.parent / "llm")
    copy = tmp_path / "entry" / "checkpoint"
    shutil.copytree(checkpoint, copy)
    for folder, digest in ((own.parent, "a"), (copy.parent, "b")):
        (folder / "manifest.json").write_text(json.dumps({"inputs": {"llm": digest * 64}}))
    with pytest.raises(ModelError, match=r"proxy of another LLM.*aaaa.*bbbb"):
        explain(copy, picture, CAPTION, proxy=own)


def test_an_adapter_for_fewer_layers_is_refused(checkpoint: Path, picture: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    adapter = write_adapter(tmp_path / "proxy", checkpoint.parent / "llm")
    tensors = load_file(adapter / "adapter_model.safetensors")
    last = max(int(name.split(".layers.")[1].split(".")[0]) for name in tensors)
    left = {name: tensor for name, tensor in tensors.items() if f".layers.{last}." not in name}
    save_file(left, adapter / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=r"changes \d+ layers, this LLM has \d+"):
        explain(checkpoint, picture, CAPTION, proxy=adapter)


def test_the_users_mistakes(checkpoint: Path, picture: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no token to explain"):
        explain(checkpoint, picture, " \n")
    with pytest.raises(DataError, match=r"gone\.png does not exist"):
        explain(checkpoint, tmp_path / "gone.png", "x")
    with pytest.raises(ModelError, match="no LLaVA checkpoint"):
        explain(checkpoint.parent / "llm", picture, "x")
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken)
    config = json.loads((broken / "config.json").read_text())
    config |= {"image_token_index": 3, "image_token_id": 3}
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="image token"):
        explain(broken, picture, "x")
    with pytest.raises(UserError, match="choose cmo"):
        explain(checkpoint, picture, "x", kind="uniform")
    with pytest.raises(UserError, match="window 2"):
        explain(checkpoint, picture, "x", window=2)
    with pytest.raises(DataError, match="images and markers differ"):
        explain(checkpoint, picture, "x", prompt="<image> and <image>")


def test_names_of_folders() -> None:
    assert name_of("/data/runs/quickstart/vanilla/checkpoint") == "quickstart/vanilla"
    assert name_of("llava-hf/llava-1.5-7b-hf") == "llava-hf/llava-1.5-7b-hf"
    assert name_of("checkpoint", Path("p")) == "checkpoint + proxy"


def test_an_explanation_draws_itself(checkpoint: Path, picture: Path, tmp_path: Path) -> None:
    found: Explanation = explain(checkpoint, picture, "a red ring")
    assert "a red ring"[2:5] in found.html()
    found.png(tmp_path / "deep" / "ring.png", found)
    assert Image.open(tmp_path / "deep" / "ring.png").width > 2000
