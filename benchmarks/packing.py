"""Tokens per second of a training step: padded batches against packed ones, and packed ones cut by a token budget.

    python benchmarks/packing.py [--json] [--out FILE] [--vocabulary 8192] [--row 128] [--threads 1]

A small random Qwen2 (hidden 256, 4 layers, sdpa) on the CPU; forward and backward of one optimizer step over the same
samples, dealt at random. Stage 1: LoRA on captions with BLIP-like lengths (lognormal, mean 20 tokens). Stage 3: chats
of lognormal length (mean 150 tokens of text), four in five with an image of 36 tokens, both passes (cmo). Variants take
turns; the minimum of the repeats counts. The losses must agree: the work is the same.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

from dpa.data.chat import Encoded
from dpa.data.collate import collate
from dpa.data.dataset import Item
from dpa.data.sampler import BatchPlan
from dpa.models import attention
from dpa.models.freeze import set_trainable
from dpa.models.lora import attach_lora
from dpa.models.settings import LoraSettings
from dpa.train.settings import StageSettings
from dpa.train.step import TrainStep, step_settings
from dpa.types import Batch, TextRules

SIDE, PATCH = 24, 4
IMAGE_TOKENS = (SIDE // PATCH) ** 2
SAMPLES = 64
MICRO_BATCH = {"proxy": 16, "finetune": 8}
"""Samples per forward, as in the paper's table of stages."""


@dataclass(frozen=True)
class Case:
    """A stage's model and samples."""

    stage: str
    objective: str
    model: nn.Module
    items: Sequence[Item]
    rules: TextRules


def lognormal(draw: np.random.Generator, count: int, mean: float, sigma: float, least: int) -> list[int]:
    values = draw.lognormal(np.log(mean) - sigma**2 / 2, sigma, count)
    return [max(least, round(float(value))) for value in values]


def text_config(vocabulary: int) -> Any:
    return AutoConfig.for_model(
        "qwen2",
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )


def rules(vocabulary: int) -> TextRules:
    return TextRules("<image>", vocabulary - 1, IMAGE_TOKENS, None, 0, "<|im_end|>", 0, "")


def item(draw: np.random.Generator, vocabulary: int, prompt: int, answer: int, *, image: bool, name: str) -> Item:
    head = [vocabulary - 1] * IMAGE_TOKENS if image else []
    ids = head + draw.integers(1, vocabulary - 1, prompt + answer).tolist()
    spans = ((0, IMAGE_TOKENS),) if image else ()
    encoded = Encoded(input_ids=ids, supervised=[False] * (len(head) + prompt) + [True] * answer, image_spans=spans)
    pixels = torch.from_numpy(draw.standard_normal((1, 3, SIDE, SIDE), dtype=np.float32)) if image else None
    return Item(encoded=encoded, pixel_values=pixels, sample_id=name, where=name)


def captions(vocabulary: int) -> Case:
    draw = np.random.default_rng(0)
    torch.manual_seed(0)
    llm = AutoModelForCausalLM.from_config(text_config(vocabulary))
    model = attach_lora(llm, LoraSettings(rank=64, alpha=128), seed=0)
    set_trainable(model, "proxy")
    lengths = lognormal(draw, SAMPLES, 20, 0.5, 4)
    items = [item(draw, vocabulary, 1, n - 1, image=False, name=f"c{i}") for i, n in enumerate(lengths)]
    return Case("proxy", "uniform", model, items, rules(vocabulary))


def chats(vocabulary: int) -> Case:
    draw = np.random.default_rng(1)
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, image_size=SIDE,
        patch_size=PATCH, projection_dim=64,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision,
        text_config=text_config(vocabulary),
        image_token_index=vocabulary - 1,
        image_seq_length=IMAGE_TOKENS,
        tie_word_embeddings=False,
    )
    model = LlavaForConditionalGeneration(config)
    set_trainable(model, "finetune")
    lengths = lognormal(draw, SAMPLES, 150, 0.8, 16)
    items = [item(draw, vocabulary, n // 3, n - n // 3, image=i % 5 > 0, name=f"q{i}") for i, n in enumerate(lengths)]
    return Case("finetune", "cmo", model, items, rules(vocabulary))


def variants(case: Case) -> dict[str, dict[str, Any]]:
    """Fields of StageSettings. The budget is what a forward of the padded variant has in real tokens on average."""
    mean = sum(len(item.encoded.input_ids) for item in case.items) / len(case.items)
    budget = round(mean * MICRO_BATCH[case.stage])
    return {
        "padded": {"packing": False},
        "packed": {"packing": True},
        "budget": {"packing": True, "tokens_per_micro_batch": budget},
    }


def prepare(case: Case, fields: dict[str, Any]) -> tuple[Callable[[], float], dict[str, int]]:
    """A function that does one step and returns its loss; and what it runs over."""
    micro_batch = MICRO_BATCH[case.stage]
    settings = StageSettings(learning_rate=1e-3, text_only="minimum", micro_batch=micro_batch, **fields)
    used = step_settings(settings, objective_name=case.objective, fidelity="exact")  # type: ignore[arg-type]
    plan = BatchPlan(
        [len(item.encoded.input_ids) for item in case.items],
        [item.pixel_values is not None for item in case.items],
        global_batch=len(case.items),
        micro_batch=micro_batch,
        tokens_per_micro_batch=settings.tokens_per_micro_batch,
        ranks=1,
        seed=0,
        group_by_length=False,
        max_steps=1,
    )
    batches: list[Batch] = [collate([case.items[i] for i in micro.indices], case.rules) for micro in plan.step(0)[0]]
    step = TrainStep(case.model, used)

    def run() -> float:
        case.model.zero_grad(set_to_none=True)
        loss, weight = 0.0, 0.0
        for batch in batches:
            output = step(batch, None)
            torch.autograd.backward(output.loss_sum)
            loss += float(output.loss_sum.detach())
            weight += float(output.weight_sum)
        return loss / weight

    tokens = sum(int(batch.attention_mask.sum()) for batch in batches)
    return run, {"forwards": len(batches), "tokens": tokens, "slots": slots(case.model, step, batches)}


@torch.no_grad()
def slots(model: nn.Module, step: TrainStep, batches: Sequence[Batch]) -> int:
    """Positions that the pass with image runs over, padding included."""
    found: list[int] = []
    body = model.get_decoder()  # type: ignore[operator]
    handle = body.register_forward_pre_hook(
        lambda _module, _args, inputs: found.append(inputs["inputs_embeds"].shape[:2].numel()), with_kwargs=True
    )
    total = 0
    for batch in batches:
        found.clear()
        step(batch, None)
        total += found[-1]  # the pass without image comes first
    handle.remove()
    return total


def measure(case: Case, repeats: int) -> list[dict[str, Any]]:
    prepared = {name: prepare(case, fields) for name, fields in variants(case).items()}
    seconds: dict[str, list[float]] = {name: [] for name in prepared}
    losses = {name: run() for name, (run, _) in prepared.items()}  # also warms up
    for _ in range(repeats):
        for name, (run, _) in prepared.items():
            began = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)
    best = {name: min(values) for name, values in seconds.items()}
    return [
        {
            "stage": case.stage,
            "variant": name,
            **facts,
            "seconds": round(best[name], 4),
            "tokens_per_second": round(facts["tokens"] / best[name], 1),
            "ratio": round(best["padded"] / best[name], 3),
            "loss": losses[name],
        }
        for name, (_, facts) in prepared.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--row", type=int, default=attention.DENSE_ROW, help="slots of a packed row (sdpa)")
    parser.add_argument("--stage", choices=["proxy", "finetune"], action="append", help="default: both")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    attention.DENSE_ROW = given.row
    make = {"proxy": captions, "finetune": chats}
    rows = [row for name in given.stage or make for row in measure(make[name](given.vocabulary), given.repeats)]
    for row in rows:
        padded = next(other for other in rows if (other["stage"], other["variant"]) == (row["stage"], "padded"))
        # float32 sums in another order
        assert abs(row["loss"] - padded["loss"]) < 1e-5 * padded["loss"], (row, padded)
    machine = {
        "machine": f"{platform.machine()}, {platform.system()}",
        "threads": given.threads,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": date.today().isoformat(),
    }
    settings = {"vocabulary": given.vocabulary, "row": given.row, "repeats": given.repeats}
    text = json.dumps({**machine, **settings, "rows": rows}, indent=2)
    if given.out is not None:
        given.out.write_text(text + "\n", encoding="utf-8")
    if given.json:
        print(text)
        return
    print(f"{'stage':9} {'variant':8} {'forwards':>8} {'tokens':>7} {'slots':>7} {'tokens/s':>9} {'ratio':>6}  loss")
    for row in rows:
        sys.stdout.write(
            f"{row['stage']:9} {row['variant']:8} {row['forwards']:8} {row['tokens']:7} {row['slots']:7} "
            f"{row['tokens_per_second']:9.0f} {row['ratio']:6.2f}  {row['loss']:.7f}\n"
        )


if __name__ == "__main__":
    main()
