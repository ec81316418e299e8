"""Whole stages in a second: a tiny random LLaVA, samples in memory, the real plan, loader and loop.

Also a program, for tests that kill it: ``python -m tests.stages WORK OPTIONS_AS_JSON``.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from dpa.data.chat import Encoded
from dpa.data.dataset import ImageTable, Item
from dpa.models.freeze import set_trainable
from dpa.testing.models import (
    BOS,
    DOCUMENT_START,
    IMAGE,
    IMAGE_TOKENS,
    PAD,
    ModelType,
    tiny_batch,
    tiny_llava,
    tiny_text_config,
)
from dpa.train.job import Caches
from dpa.train.loop import StageBatches, StageJob, StageResult, train_stage
from dpa.train.metrics import TIMING_FIELDS, read_metrics
from dpa.train.progress import NoProgress
from dpa.train.settings import StageSettings, TrainSettings
from dpa.train.step import step_settings
from dpa.types import TextRules

RULES = TextRules(
    image_token="<image>",
    image_token_id=IMAGE,
    image_tokens=IMAGE_TOKENS,
    bos_id=BOS,
    document_start_id=DOCUMENT_START,
    end_of_turn="<|im_end|>",
    pad_id=PAD,
    chat_template="",
)

MIXED = (
    "bos image text:2 label:5",
    "bos text:3 label:4",
    "bos text:1 image text:2 label:9",
    "bos image label:3 text:2 label:6",
    "bos text:2 label:7 text:1 label:2",
    "bos image text:6 label:1",
)
"""Samples with and without image, of many lengths, with one run of labels and with two."""
IMAGES = tuple(structure for structure in MIXED if "image" in structure)
TEXTS = tuple(structure for structure in MIXED if "image" not in structure)


class MemoryData:
    """What ``StageData`` is to the loader: samples with these structures, each with tokens and pixels of its own."""

    def __init__(self, structures: Sequence[str], *, broken: str | None = None, marks: bool = False) -> None:
        """``broken``: id of a sample whose pixels are NaN. ``marks``: samples with image mark every third id."""
        self.structures = tuple(structures)
        self.broken = broken
        self.marks = marks

    def __len__(self) -> int:
        return len(self.structures)

    def __getitem__(self, index: int) -> Item:
        batch = tiny_batch([self.structures[index]], seed=index)
        ids = batch.input_ids[0].tolist()
        spans = tuple((at, at + IMAGE_TOKENS) for at in range(len(ids)) if ids[at] == IMAGE and ids[at - 1] != IMAGE)
        pixels = batch.pixel_values
        if pixels is not None and self.broken == f"s{index}":
            pixels = pixels * torch.nan
        marked = [token % 3 == 0 for token in ids] if self.marks and spans else None
        encoded = Encoded(input_ids=ids, supervised=batch.supervised[0].tolist(), image_spans=spans, marked=marked)
        return Item(encoded=encoded, pixel_values=pixels, sample_id=f"s{index}", where=f"memory, record {index}")

    def text_item(self, index: int) -> Item:
        return replace(self[index], pixel_values=None)

    def pixels(self, source: int, name: str) -> torch.Tensor:
        pixels = self[source].pixel_values
        assert pixels is not None
        return pixels[int(name)]

    def image_table(self) -> ImageTable:
        """Every sample is a source of its own; its images' names are their places."""
        counts = [structure.split().count("image") for structure in self.structures]
        names = tuple((index, str(place)) for index, count in enumerate(counts) for place in range(count))
        return ImageTable(names, np.arange(len(names)), np.concatenate([[0], np.cumsum(counts)]))


@dataclass(frozen=True)
class Options:
    """What a test varies."""

    stage: str = "finetune"
    family: ModelType = "qwen2"
    structures: Sequence[str] = MIXED
    samples: int = 24
    objective: str = "cmo"
    fidelity: str = "exact"
    workers: int = 0
    dropout: float = 0.0
    seed: int = 0
    broken: str | None = None
    learning_rate: float = 1e-3
    global_batch: int = 8
    micro_batch: int = 8
    max_steps: int = 4
    save_steps: int = 100
    bounds: tuple[float, float] | None = (1e-4, 0.05)
    """Narrow for cmo: a random model is never sure, and weights shall lie between the bounds. None: the objective's."""
    more: Mapping[str, Any] | None = None
    """Further fields of StageSettings."""
    parallel: str = "ddp"
    precision: str = "fp32"
    hollow: bool = False
    """Ranks but the first start with shapes alone, on the meta device."""
    document_start: bool = True
    """The family has a token that may stand before the first text."""
    caches: str | None = None
    """Folder of caches, relative to the job's own; None: none is used."""
    cached: Sequence[str] = ("text",)
    """Which: ``text``, ``vision``."""


def tiny_model(options: Options) -> nn.Module:
    if options.stage != "proxy":
        model: nn.Module = tiny_llava(options.family, layers=2)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            llm = AutoModelForCausalLM.from_config(tiny_text_config(options.family, layers=2))
            config = LoraConfig(r=4, lora_alpha=8, lora_dropout=options.dropout, target_modules="all-linear")
            model = get_peft_model(llm, config)
    set_trainable(model, options.stage)  # type: ignore[arg-type]
    if options.precision == "bf16":
        for value in model.parameters():
            value.data = value.data if value.requires_grad else value.data.to(torch.bfloat16)
    return model.to("meta") if options.hollow and os.environ.get("RANK", "0") != "0" else model


def tiny_reference(options: Options) -> nn.Module:
    """For ``prior``: another LLM than the model's."""
    llm = tiny_llava(options.family, seed=7, layers=2)
    return llm.requires_grad_(False)


def tiny_caches(work: Path, options: Options) -> Caches:
    if options.caches is None:
        return Caches()
    what = [options.family, options.samples, options.structures, options.objective == "prior"]
    inputs = {name: {"of": what} for name in options.cached}
    return Caches(root=work / options.caches, **inputs)


def tiny_job(work: Path, options: Options, *, on_step: Sequence[Callable[[Mapping[str, Any]], None]] = ()) -> StageJob:
    structures = TEXTS if options.stage == "proxy" else options.structures
    data = MemoryData(
        [structures[i % len(structures)] for i in range(options.samples)],
        broken=options.broken,
        marks=options.objective == "spans",
    )
    items = [data[i] for i in range(len(data))]
    settings = StageSettings.model_validate(
        {
            "learning_rate": options.learning_rate,
            "global_batch": options.global_batch,
            "micro_batch": options.micro_batch,
            "max_steps": options.max_steps,
            "save_steps": options.save_steps,
            "warmup_ratio": 0.1,
            **({"minimum": options.bounds[0], "maximum": options.bounds[1]} if options.bounds else {}),
            **(options.more or {}),
        }
    )
    objective = "uniform" if options.stage == "proxy" else options.objective
    work.mkdir(parents=True, exist_ok=True)
    return StageJob(
        stage=options.stage,
        model=tiny_model(options),
        step=step_settings(settings, objective_name=objective, fidelity=options.fidelity),  # type: ignore[arg-type]
        settings=settings,
        train=TrainSettings(trackers=(), threads=1, precision=options.precision),  # type: ignore[arg-type]
        parallel=options.parallel,  # type: ignore[arg-type]
        seed=options.seed,
        batches=StageBatches(
            data=data,  # type: ignore[arg-type]
            lengths=[len(item.encoded.input_ids) for item in items],
            has_image=[item.pixel_values is not None for item in items],
            rules=RULES if options.document_start else replace(RULES, document_start_id=None),
            settings=settings,
            seed=options.seed,
            workers=options.workers,
            labels=[sum(item.encoded.supervised) for item in items],
        ),
        caches=tiny_caches(work, options),
        reference=tiny_reference(options) if objective == "prior" else None,
        work=work,
        fingerprint="f" * 64,
        progress=NoProgress(),
        on_step=tuple(on_step),
    )


@dataclass(frozen=True)
class Trained:
    """What a test compares. Picklable."""

    result: StageResult
    rows: list[dict[str, Any]]
    """Metrics without timings."""
    weights: dict[str, torch.Tensor]


def run(work: Path, options: Options, **more: Any) -> Trained:
    job = tiny_job(work, options, **more)
    result = train_stage(job)
    # of shards, rank 0 alone has the whole at the end
    weights = {name: value.detach().clone() for name, value in job.trained().items() if not value.is_meta}
    return Trained(result=result, rows=untimed(read_metrics(job.metrics)), weights=weights)


def untimed(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name not in TIMING_FIELDS} for row in rows]


def digest(weights: Mapping[str, torch.Tensor]) -> str:
    found = hashlib.sha256()
    for name in sorted(weights):
        found.update(name.encode() + weights[name].contiguous().numpy().tobytes())
    return found.hexdigest()


class Interrupted(Exception):  # noqa: N818 - it stands for a kill, not for an error
    """Stands for whatever ends a process between two steps."""


def stop_after(step: int) -> Callable[[Mapping[str, Any]], None]:
    def stop(row: Mapping[str, Any]) -> None:
        if row["step"] == step:
            raise Interrupted

    return stop


def main() -> None:
    torch.set_num_threads(1)
    trained = run(Path(sys.argv[1]), Options(**json.loads(sys.argv[2])))
    print(json.dumps({"digest": digest(trained.weights), "rows": trained.rows}))


if __name__ == "__main__":
    main()
