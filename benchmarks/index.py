"""The index of a large file and ``dpa data check``: ``python benchmarks/index.py [--samples N] [--json] [--out FILE]``.

Writes a LLaVA ``.json`` (one list) of ``--samples`` generated captions and measures, each in a process of its own so
that peaks do not mix: the first opening (digest, reading, index), an opening with the index there (files in the page
cache, and not), and random samples per second. Then the pass that ``dpa data check`` and every run make before
training: tokens of ``--check-samples`` such captions without images, ``--images`` captions with a JPEG of 336 x 336
each, decoded, and the first of the two again. Memory is the peak of the process: private (what the program holds) and
with file pages that it shares with the page cache. ``check_arrays`` is the check of the large file without tokenising
and without looking at images: what it holds in memory. CPU seconds count worker processes; on a busy machine they
say more than seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

SAMPLES = 1_200_000
CHECK_SAMPLES = 100_000
WORDS = 4096
CASES = (
    "imports",
    "index",
    "open_cold",
    "open_warm",
    "sample",
    "check_arrays",
    "check_text",
    "check_images",
    "check_again",
)


def write_file(path: Path, count: int) -> None:
    """Captions of 20 to 180 words: about 0.8 kB a record, as long as ShareGPT4V's detailed ones on average."""
    rng = np.random.default_rng(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(rng.choice(list(letters), rng.integers(2, 9))) for _ in range(WORDS)]
    with open(path, "w", encoding="utf-8") as file:
        file.write("[")
        for start in range(0, count, 10_000):
            size = min(10_000, count - start)
            lengths = rng.integers(20, 181, size)
            drawn = rng.integers(0, WORDS, int(lengths.sum()))
            ends = np.cumsum(lengths)
            for place in range(size):
                number = start + place
                text = " ".join(words[word] for word in drawn[ends[place] - lengths[place] : ends[place]])
                turns = [{"from": "human", "value": "<image>\nDescribe."}, {"from": "gpt", "value": f"{text}."}]
                row = {"id": f"{number:09d}", "image": f"{number % 1000:05d}/{number:09d}.jpg", "conversations": turns}
                file.write((",\n" if number else "") + json.dumps(row))
        file.write("]")


def write_images(path: Path, folder: Path, count: int) -> None:
    """``count`` captions with a 336 x 336 JPEG each."""
    from PIL import Image

    rng = np.random.default_rng(1)
    folder.mkdir(parents=True)
    rows = []
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        coarse.resize((336, 336), Image.Resampling.BICUBIC).save(folder / f"{number}.jpg", quality=85)
        turns = [
            {"from": "human", "value": "<image>\nSay."},
            {"from": "gpt", "value": f"a red circle, number {number}"},
        ]
        rows.append({"id": str(number), "image": f"pictures/{number}.jpg", "conversations": turns})
    path.write_text(json.dumps(rows), encoding="utf-8")


class Peak:
    """Watches this process: private memory has no high-water mark of its own."""

    def __init__(self) -> None:
        self.private = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stop.wait(0.05):
            self.private = max(self.private, _status("RssAnon"))

    def figures(self) -> dict[str, float]:
        self._stop.set()
        self._thread.join()
        self.private = max(self.private, _status("RssAnon"))
        return {"private_mb": round(self.private / 1e6), "with_file_pages_mb": round(_status("VmHWM") / 1e6)}


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def _records(path: Path) -> Any:
    from dpa.data.records import read_records
    from dpa.data.settings import DataSource

    return read_records(DataSource(path=path), path.parent / "store" / ".cache", seed=0)


def _out_of_page_cache(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def case_imports(folder: Path) -> dict[str, Any]:
    """What every other figure contains."""
    import dpa.data.records

    return {"version": dpa.data.records.READER_VERSION}


def case_index(folder: Path) -> dict[str, Any]:
    return {"samples": len(_records(folder / "captions.json"))}


def case_open_cold(folder: Path) -> dict[str, Any]:
    return {"samples": len(_records(folder / "captions.json"))}


case_open_warm = case_open_cold


def case_sample(folder: Path) -> dict[str, Any]:
    records = _records(folder / "captions.json")
    places = np.random.default_rng(2).integers(0, len(records), 50_000)
    began = time.perf_counter()
    characters = sum(len(records[int(place)].turns[1].text) for place in places)
    return {"samples_per_second": round(len(places) / (time.perf_counter() - began)), "characters": characters}


def _check(folder: Path, name: str, stage: str) -> dict[str, Any]:
    from dpa.pipeline.data_check import check_source

    began, cpu = time.perf_counter(), _cpu()
    (found,) = check_source(folder / name, stage=stage, store=folder / "store").stages
    seconds, cpu = time.perf_counter() - began, _cpu() - cpu
    assert found.usable == found.samples, found.problems
    rates = {"samples_per_second": found.samples / seconds, "samples_per_cpu_second": found.samples / cpu}
    return {"samples": found.samples, **{name: round(rate) for name, rate in rates.items()}}


def case_check_arrays(folder: Path) -> dict[str, Any]:
    """What the check itself holds of the large file: tokenising and looking at images are left out."""
    import dpa.data.audit as audit
    from dpa.data.image_check import ImageFact
    from dpa.data.text_pass import TextFacts

    def known_texts(data: Any, folder: Path, progress: Any) -> TextFacts:
        return TextFacts(*(np.ones(len(data), dtype=np.int32) for _ in range(3)), {})

    def known_images(store: Any, names: list[str], **_: Any) -> Iterator[ImageFact]:
        return (ImageFact(place.to_bytes(16, "big"), 336, 336) for place, _ in enumerate(names, 1))

    audit.text_facts, audit.check_images = known_texts, known_images
    return _check(folder, "captions.json", "pretrain")


def case_check_text(folder: Path) -> dict[str, Any]:
    return _check(folder, "few.json", "proxy")


def case_check_images(folder: Path) -> dict[str, Any]:
    return _check(folder, "images.json", "pretrain")


case_check_again = case_check_text


def run_case(name: str, folder: Path) -> dict[str, Any]:
    """In this process: seconds, result, peak."""
    case: Callable[[Path], dict[str, Any]] = globals()[f"case_{name}"]
    peak = Peak()
    began, cpu = time.perf_counter(), _cpu()
    found = case(folder)
    seconds, cpu = time.perf_counter() - began, _cpu() - cpu
    return {"seconds": round(seconds, 2), "cpu_seconds": round(cpu, 2), **found, **peak.figures()}


def _cpu() -> float:
    """Of this process and its finished children."""
    return sum(
        usage.ru_utime + usage.ru_stime
        for usage in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--check-samples", type=int, default=CHECK_SAMPLES)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--folder", type=Path, help="keep the generated files here and use them again")
    parser.add_argument("--cases", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")
    parser.add_argument("--run-case", choices=CASES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run_case:
        print(json.dumps(run_case(options.run_case, options.folder)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        result = benchmark(folder, options.samples, options.check_samples, options.images, options.cases)
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2) if options.json else table(result))


def benchmark(folder: Path, samples: int, check_samples: int, images: int, cases: list[str]) -> dict[str, Any]:
    import torch
    from benchkit.machine import describe_machine

    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "captions.json").is_file():
        write_file(folder / "captions.json", samples)
    if "check_text" in cases and not (folder / "few.json").is_file():
        write_file(folder / "few.json", check_samples)
    if "check_images" in cases and not (folder / "images.json").is_file():
        write_images(folder / "images.json", folder / "pictures", images)
    found: dict[str, Any] = {}
    for name in cases:
        if name == "open_cold":
            _out_of_page_cache(folder)
        command = [sys.executable, __file__, "--run-case", name, "--folder", str(folder)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found[name] = json.loads(done.stdout.splitlines()[-1])
        if name == "index":
            indices = folder.glob("store/.cache/records/*.arrow")
            found[name]["index_mb"] = round(max(path.stat().st_size for path in indices) / 1e6)
    return {
        "samples": samples,
        "file_mb": round((folder / "captions.json").stat().st_size / 1e6),
        "check_samples": check_samples,
        "images": images,
        "cases": found,
        **describe_machine(torch.device("cpu")),
    }


def table(result: dict[str, Any]) -> str:
    from benchkit.machine import format_table

    header = ["", "seconds", "CPU seconds", "samples/s", "private MB", "with file pages MB"]
    rows = []
    for name, case in result["cases"].items():
        times = [f"{case['seconds']:.1f}", f"{case['cpu_seconds']:.1f}", str(case.get("samples_per_second", ""))]
        rows.append([name, *times, str(case["private_mb"]), str(case["with_file_pages_mb"])])
    about = f"{result['samples']} samples, file {result['file_mb']} MB"
    return f"{about}\n{format_table(header, rows)}"


if __name__ == "__main__":
    main()
