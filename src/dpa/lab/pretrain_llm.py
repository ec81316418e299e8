"""Make the lab's LLM from nothing: ``python -m dpa.lab.pretrain_llm --out DIR``.

A Qwen2 model of about two million parameters and its own tokenizer, trained on language A, on questions about text
descriptions and on a little of language B's vocabulary (see :mod:`dpa.lab.pretrain_text`). The run continues from
``--state`` where that file exists; usable weights are written to ``--out`` on the way, the best last.

Legend: B sequences, L tokens of a sequence, N supervised tokens, V vocabulary, H hidden.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from torch.utils.data import DataLoader, IterableDataset
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from dpa.lab.lookup_init import tie_related_words, wire_lookup, wired_parameters
from dpa.lab.pretrain_text import Encoder, Mixture, Stream, train_tokenizer
from dpa.lab.questions import KINDS
from dpa.lab.text_eval import measure, question_accuracy

ASSETS = Path(__file__).parent / "assets" / "llm"


@dataclass(frozen=True, slots=True)
class Settings:
    """All that decides the result."""

    steps: int = 5000
    acquaintance: int = 300
    """Steps after those in which some of language B is met, at a low learning rate."""
    acquaintance_share: float = 0.15
    """Share of language B then."""
    acquaintance_rate: float = 5e-4
    batch: int = 24
    length: int = 160
    """Tokens per sequence."""
    hidden: int = 192
    layers: int = 5
    intermediate: int = 512
    vocabulary: int = 1024
    learning_rate: float = 2e-3
    warmup: int = 50
    weight_decay: float = 0.05
    clip: float = 1.0
    initial: float = 0.05
    """Standard deviation of the first weights; the usual 0.02 is made for models ten times as wide."""
    slow: float = 0.1
    """Learning rate of embeddings, queries and keys at first, as a share of the others' (see ``lookup_init``)."""
    slow_steps: int = 400
    """Steps until that share begins to rise; after three times as many it is a half."""
    seed: int = 0
    easy_steps: int = 250
    """Steps with up to three objects and direct look-ups only; as long again with all kinds of questions."""

    @property
    def all_steps(self) -> int:
        """Steps of the whole run."""
        return self.steps + self.acquaintance


def curriculum(step: int, settings: Settings) -> Mixture:
    """What the stream holds at ``step``: look-up in small scenes first, because everything else is built on it."""
    direct = ("colour", "shape", "size", "texture", "position")
    phase = step / settings.easy_steps
    if phase < 1:
        kinds = tuple((kind, 1.0) for kind in direct)
        return Mixture(2, 3, captions=0.0, describe=0.0, compact=0.5, synonyms=0.0, raw_b=0.0, kinds=kinds)
    if phase < 2:
        kinds = tuple((kind, 2.0 if kind in direct else 1.0) for kind in KINDS)
        return Mixture(2, 3, captions=0.05, describe=0.1, compact=0.4, kinds=kinds)
    if phase < 4:
        return Mixture(kinds=tuple((kind, 1.0 if kind in direct else 1.75) for kind in KINDS))
    # Most look-ups come early; what comes late is asked most from here on.
    often = {"position": 2.5, "count": 2.5, "comparison": 2.0, "relation": 2.5}
    late = Mixture(kinds=tuple((kind, often.get(kind, 0.5)) for kind in KINDS))
    return late if step < settings.steps else replace(late, raw_b=settings.acquaintance_share)


class _Batches(IterableDataset[tuple[torch.Tensor, torch.Tensor]]):
    """The stream from ``start`` on, for a worker process."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, settings: Settings, start: int) -> None:
        self._tokenizer = tokenizer
        self._settings = settings
        self._start = start

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        settings = self._settings
        stream = Stream(Encoder(self._tokenizer), settings.seed, settings.batch, settings.length)
        for step in range(self._start, settings.all_steps):
            yield stream.batch(step, curriculum(step, settings))


def build_model(settings: Settings, tokenizer: PreTrainedTokenizerFast) -> Qwen2ForCausalLM:
    """A fresh model: stock Qwen2, heads of 32, tied embeddings."""
    torch.manual_seed(settings.seed)
    config = Qwen2Config(
        vocab_size=settings.vocabulary,
        hidden_size=settings.hidden,
        intermediate_size=settings.intermediate,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.hidden // 32,
        num_key_value_heads=settings.hidden // 32,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        initializer_range=settings.initial,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config._attn_implementation = "eager"
    model = Qwen2ForCausalLM(config)
    wire_lookup(model, settings.initial, settings.seed)
    tie_related_words(model.model.embed_tokens.weight.data, tokenizer.get_vocab())
    return model


def loss_sum(
    model: Qwen2ForCausalLM, body: Any, ids_BL: torch.Tensor, weights_BL: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted sum of the next-token losses and the sum of the weights; logits only where something is supervised."""
    hidden_BLH = body(input_ids=ids_BL, use_cache=False).last_hidden_state
    weights = weights_BL[:, 1:]
    chosen = weights > 0
    logits_NV = model.lm_head(hidden_BLH[:, :-1][chosen]).float()
    losses_N = functional.cross_entropy(logits_NV, ids_BL[:, 1:][chosen], reduction="none")
    return (losses_N * weights[chosen]).sum(), weights.sum()


def learning_rate(step: int, settings: Settings) -> float:
    """Linear warm-up, a cosine down to a hundredth; a low rate for the acquaintance with B, linearly to nothing."""
    if step >= settings.steps:
        return settings.acquaintance_rate * (1 - (step - settings.steps) / settings.acquaintance)
    if step < settings.warmup:
        return settings.learning_rate * (step + 1) / settings.warmup
    progress = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    return settings.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def wired_share(step: int, settings: Settings) -> float:
    """The share of the learning rate that the wired parameters get."""
    progress = (step - settings.slow_steps) / (2 * settings.slow_steps)
    return settings.slow + (0.5 - settings.slow) * min(1.0, max(0.0, progress))


def save(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, measurements: dict[str, Any], folder: Path
) -> None:
    """Write the Hugging Face folder beside ``folder``, in bf16, then put it in place: readers never see half of it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = folder.with_name(folder.name + ".new")
    old = folder.with_name(folder.name + ".old")
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    half = Qwen2ForCausalLM(model.config)
    half.load_state_dict(model.state_dict())
    half.bfloat16()
    half.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=False
    )
    half.save_pretrained(fresh)
    tokenizer.save_pretrained(fresh)
    (fresh / "measurements.json").write_text(json.dumps(measurements, indent=1) + "\n")
    for file in fresh.iterdir():
        file.chmod(0o644)
    if folder.exists():
        os.replace(folder, old)
    os.replace(fresh, folder)
    shutil.rmtree(old, ignore_errors=True)


class Log:
    """One JSON object per line, also on the screen."""

    def __init__(self, path: Path | None) -> None:
        self._path = path

    def __call__(self, **values: Any) -> None:
        line = json.dumps(
            {key: round(value, 4) if isinstance(value, float) else value for key, value in values.items()}
        )
        print(line, flush=True)
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(line + "\n")


@dataclass(frozen=True, slots=True)
class Outputs:
    """Where a run writes, and how often."""

    out: Path
    every: int
    """Steps between two looks at the held-out questions."""
    state: Path | None = None
    log: Path | None = None
    usable: float = 0.8
    """Held-out accuracy from which on weights are written to ``out`` before the end."""


def _optimizer(model: Qwen2ForCausalLM, settings: Settings) -> torch.optim.AdamW:
    wired = wired_parameters(model)
    names = {id(value) for value in wired}
    others = [value for value in model.parameters() if id(value) not in names]
    groups = [
        {"params": wired, "weight_decay": 0.0},
        {"params": [value for value in others if value.dim() > 1], "weight_decay": settings.weight_decay},
        {"params": [value for value in others if value.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.98), fused=True)


def train(settings: Settings, outputs: Outputs, *, compiled: bool = True) -> Qwen2ForCausalLM:
    """The whole run. Returns the trained model (float32)."""
    log = Log(outputs.log)
    tokenizer = train_tokenizer(settings.vocabulary)
    model = build_model(settings, tokenizer)
    optimizer = _optimizer(model, settings)
    start, seconds = _load_state(outputs.state, model, optimizer)
    body: Any = torch.compile(model.model) if compiled else model.model
    loader = DataLoader(_Batches(tokenizer, settings, start), batch_size=None, num_workers=1, prefetch_factor=8)
    began = time.monotonic() - seconds
    log(settings=asdict(settings), parameters=model.num_parameters(), start=start)
    running = 0.0
    for step, (ids_BL, weights_BL) in enumerate(loader, start):
        wired, *others = optimizer.param_groups
        wired["lr"] = learning_rate(step, settings) * wired_share(step, settings)
        for group in others:
            group["lr"] = learning_rate(step, settings)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            total, count = loss_sum(model, body, ids_BL, weights_BL)
        (total / count).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        optimizer.step()
        optimizer.zero_grad()
        running += float(total.detach() / count) / outputs.every
        if (step + 1) % outputs.every == 0 or step + 1 == settings.all_steps:
            elapsed = time.monotonic() - began
            accuracy = question_accuracy(model, tokenizer, scenes=150, per_scene=4)
            log(step=step + 1, loss=running, seconds=elapsed, **accuracy)
            running = 0.0
            _save_state(outputs.state, model, optimizer, step + 1, elapsed)
            if accuracy["mean"] >= outputs.usable and step + 1 < settings.all_steps:
                save(model, tokenizer, {"step": step + 1, "accuracy": accuracy, "final": False}, outputs.out)
    _finish(model, tokenizer, settings, outputs, time.monotonic() - began, log)
    return model


def _finish(
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    settings: Settings,
    outputs: Outputs,
    seconds: float,
    log: Log,
) -> None:
    """Measure what will be shipped, that is the weights rounded to bf16, and write it."""
    rounded = Qwen2ForCausalLM(model.config)
    rounded.load_state_dict({name: value.to(torch.bfloat16) for name, value in model.state_dict().items()})
    measurements = {
        "final": True,
        "parameters": model.num_parameters(),
        "training_seconds": round(seconds),
        "threads": torch.get_num_threads(),
        "settings": asdict(settings),
        **measure(rounded, tokenizer),
    }
    save(model, tokenizer, measurements, outputs.out)
    log(**measurements)


def _save_state(
    path: Path | None, model: Qwen2ForCausalLM, optimizer: torch.optim.Optimizer, step: int, seconds: float
) -> None:
    if path is None:
        return
    fresh = path.with_name(path.name + ".new")
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "seconds": seconds}
    torch.save(state, fresh)
    os.replace(fresh, path)


def _load_state(path: Path | None, model: Qwen2ForCausalLM, optimizer: torch.optim.Optimizer) -> tuple[int, float]:
    """Continue from ``path`` where it exists; returns the step to go on with and the seconds spent so far."""
    if path is None or not path.exists():
        return 0, 0.0
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"]), float(state["seconds"])


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m dpa.lab.pretrain_llm", description=str(__doc__).split("\n")[0])
    parser.add_argument("--out", type=Path, default=ASSETS, help="Hugging Face folder to write")
    parser.add_argument("--log", type=Path, default=None, help="JSONL file to append to")
    parser.add_argument("--state", type=Path, default=None, help="file to continue from, and to save to")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--eager", action="store_true", help="do not compile the model")
    parser.add_argument("--every", type=int, default=250)
    for name, default in asdict(Settings()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    values = vars(parser.parse_args(arguments))
    torch.set_num_threads(values["threads"])
    settings = replace(Settings(), **{name: values[name] for name in asdict(Settings())})
    outputs = Outputs(out=values["out"], state=values["state"], log=values["log"], every=values["every"])
    train(settings, outputs, compiled=not values["eager"])


if __name__ == "__main__":
    main()
