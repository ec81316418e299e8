"""Images per second of the loader against bare decoding: ``python benchmarks/data.py [--json] [--out FILE]``.

Makes JPEG files of several sizes in a temporary folder. "decode" is Pillow alone (open and convert to RGB, one after
the other in one process); a loader's rate covers reading, decoding, resizing and normalising, tokenising, collating and
what it costs to hand batches over from worker processes. Each rate is the best of ``--repeats``, the cases in turn.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
import transformers
from PIL import Image

from dpa.data.dataset import StageData
from dpa.data.images import ImageTransform, load_image
from dpa.data.loader import make_loader
from dpa.data.records import read_records
from dpa.data.sampler import BatchPlan
from dpa.data.settings import DataSource
from dpa.models.families import family_of, text_rules
from dpa.models.parts import image_tokens_of, load_tokenizer, resolve_part, tower_config
from dpa.models.processor import make_image_processor
from dpa.models.settings import ModelSettings

SIZES = ((336, 336), (640, 480), (1280, 960), (2048, 1536))
SIDE = 336
"""R, CLIP-L's."""


def write_data(folder: Path, size: tuple[int, int], count: int) -> Path:
    """JPEGs that are neither flat nor noise: smooth colours with some grain, as photographs have."""
    width, height = size
    rng = np.random.default_rng(width)
    rows = []
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC), dtype=np.int16)
        grain = rng.integers(-12, 13, (height, width, 1), dtype=np.int16)
        name = f"{width}-{number}.jpg"
        Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8)).save(folder / name, quality=90)
        turns = [
            {"from": "human", "value": "<image>\nSay."},
            {"from": "gpt", "value": f"a red circle, number {number}"},
        ]
        rows.append({"id": name, "image": name, "conversations": turns})
    path = folder / f"{width}.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def open_data(path: Path, *, reduced: bool) -> StageData:
    """With the lab's tokenizer and a crop to SIDE, as in stage 2."""
    model = ModelSettings(llm="lab:llm", vision_tower="lab:tower")
    tokenizer, tower = load_tokenizer(model), tower_config(model)
    config = transformers.AutoConfig.from_pretrained(resolve_part(model.llm))
    rules = text_rules(family_of(config, tokenizer), tokenizer, image_tokens_of(tower))
    tower.image_size = SIDE
    transform = ImageTransform(make_image_processor(model, tower, "crop"), "crop", SIDE, max_pixels=10**8)
    return StageData(
        [read_records(DataSource(path=path), path.parent / "cache", seed=0)],
        tokenizer,
        rules,
        format="plain",
        with_images=True,
        max_length=2048,
        transform=transform,
        max_image_pixels=10**8,
        reduced_decode=reduced,
    )


def decode(data: StageData) -> None:
    """The yardstick."""
    for sample in data.sources[0]:
        with Image.open(data.sources[0].store.place(sample.images[0]).path) as image:
            image.convert("RGB")


def load(data: StageData, workers: int) -> None:
    count = len(data)
    plan = BatchPlan(
        [1] * count, [True] * count, global_batch=8, micro_batch=8, ranks=1, seed=0, group_by_length=False, epochs=1
    )
    for _ in make_loader(data, plan, 0, 0, data.rules, workers, False):
        pass


def difference(data: StageData) -> tuple[float, float]:
    """Mean and largest difference of a reduced decode, in grey levels of 0 ... 255 after the resize."""
    transform = data.transform
    assert transform is not None
    levels = 255 * torch.tensor(transform.image_processor.image_std).view(3, 1, 1)
    found = []
    for sample in data.sources[0]:
        path = data.sources[0].store.place(sample.images[0]).path
        whole = transform(load_image(path, max_pixels=10**8))
        reduced = transform(load_image(path, max_pixels=10**8, reduce_to=transform))
        found.append(((whole - reduced) * levels).abs())
    return float(torch.stack(found).mean()), float(torch.stack(found).max())


def measure(cases: dict[str, Callable[[], None]], count: int, repeats: int) -> dict[str, float]:
    """Images per second of each case; cases in turn, so that a slow moment of the machine hits all alike."""
    best = dict.fromkeys(cases, float("inf"))
    for _ in range(repeats):
        for name, case in cases.items():
            began = time.perf_counter()
            case()
            best[name] = min(best[name], time.perf_counter() - began)
    return {name: round(count / seconds, 1) for name, seconds in best.items()}


def benchmark(folder: Path, *, count: int, repeats: int, workers: list[int]) -> list[dict[str, Any]]:
    rows = []
    for size in SIZES:
        path = write_data(folder, size, count)
        data, reduced = open_data(path, reduced=False), open_data(path, reduced=True)
        cases: dict[str, Callable[[], None]] = {"decode": lambda data=data: decode(data)}  # type: ignore[misc]
        for number in workers:
            cases[f"{number} workers"] = lambda data=data, number=number: load(data, number)  # type: ignore[misc]
            cases[f"{number} workers, reduced"] = lambda data=reduced, number=number: load(data, number)  # type: ignore[misc]
        mean, largest = difference(data)
        rows.append(
            {
                "size": f"{size[0]} x {size[1]}",
                "images_per_second": measure(cases, count, repeats),
                "reduced_mean_difference": round(mean, 3),
                "reduced_largest_difference": round(largest, 1),
            }
        )
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    names = list(rows[0]["images_per_second"])
    print("images per second; difference of a reduced decode in grey levels (mean, largest)")
    print("".join(f"{name:>20}" for name in ("size", *names, "difference")))
    for row in rows:
        rates = [f"{row['images_per_second'][name]:.0f}" for name in names]
        apart = f"{row['reduced_mean_difference']:.2f}, {row['reduced_largest_difference']:.0f}"
        print("".join(f"{value:>20}" for value in (row["size"], *rates, apart)))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--images", type=int, default=48, help="per size")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        rows = benchmark(Path(folder), count=options.images, repeats=options.repeats, workers=options.workers)
    result = {
        "rows": rows,
        "images_per_size": options.images,
        "repeats": options.repeats,
        "side": SIDE,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {"torch": torch.__version__, "pillow": PIL.__version__, "transformers": transformers.__version__},
        "date": datetime.date.today().isoformat(),
    }
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        show(rows)


if __name__ == "__main__":
    main()
