"""Which files a benchmark may lie in, where they are downloaded, and how many questions they hold.

Names, addresses and md5 sums are VLMEvalKit's (``DATASET_URL``, ``DATASET_MD5``); the copies on the Hugging Face hub
are those of lmms-eval's tasks and of the benchmarks' authors.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dpa.data.tables import columns_of
from dpa.errors import DataError

_OPENXLAB = "https://opencompass.openxlab.space/utils/VLMEval"


@dataclass(frozen=True, slots=True)
class Tsv:
    """VLMEvalKit's files; all parts together are the benchmark."""

    parts: tuple[tuple[str, str, str], ...]
    """File name, address, md5."""
    questions: int | None
    """None: the count is not published; what can be checked is that every question has all its rolls."""


@dataclass(frozen=True, slots=True)
class Table:
    """Parquet files, or what ``save_to_disk`` wrote, in a folder; the first pattern with any file is taken."""

    folders: tuple[str, ...]
    patterns: tuple[str, ...]
    hub: str
    """Data set on the hub, with its split."""
    questions: int
    images: tuple[str, ...] = ("image",)
    """Columns of images."""


@dataclass(frozen=True, slots=True)
class Pictures:
    """MMVP as its authors give it: ``Questions.csv`` beside a folder of numbered JPEGs."""

    folders: tuple[str, ...]
    hub: str
    questions: int
    table: str = "Questions.csv"
    pictures: str = "MMVP Images"


Layout = Tsv | Table | Pictures


def _tsv(*names: str, questions: int | None, md5: tuple[str, ...], at: str = _OPENXLAB) -> Tsv:
    return Tsv(tuple((f"{n}.tsv", f"{at}/{n}.tsv", sum_) for n, sum_ in zip(names, md5, strict=True)), questions)


def _patterns(*splits: str) -> tuple[str, ...]:
    """Files of a split as they lie on the hub and after ``save_to_disk``; last, a folder that holds the split alone."""
    named = (f"{place}{split}" for split in splits for place in ("", "data/", "en/", "DocVQA/", "default/"))
    found = [f"{name}{end}" for name in named for end in ("-*.parquet", "_*.parquet", ".parquet", "/*.arrow")]
    return (*found, "*.arrow", "*.parquet")


_MMBENCH = "https://opencompass.openxlab.space/utils/benchmarks/MMBench"
_NATURAL = "https://huggingface.co/datasets/BaiqiL/NaturalBench/resolve/main"
_FOUR_IMAGES = ("Image_0", "Image_1")

LAYOUTS: dict[str, tuple[Layout, ...]] = {
    "mmbench": (
        _tsv("MMBench_DEV_EN", questions=4329, md5=("b6caf1133a01c6bb705cf753bb527ed8",), at=_MMBENCH),
        _tsv("MMBench_DEV_EN_V11", questions=None, md5=("30c05be8f2f347a50be25aa067248184",), at=_MMBENCH),
        Table(("mmbench", "MMBench"), _patterns("dev"), "lmms-lab/MMBench (en, dev)", 4329),
    ),
    "ai2d": (
        _tsv("AI2D_TEST", questions=3088, md5=("0f593e0d1c7df9a3d69bf1f947e71975",)),
        Table(("ai2d", "AI2D"), _patterns("test"), "lmms-lab/ai2d (test)", 3088),
    ),
    "docvqa": (
        _tsv("DocVQA_VAL", questions=5349, md5=("d5ee77e1926ff10690d469c56b73eabf",)),
        Table(("docvqa", "DocVQA"), _patterns("validation"), "lmms-lab/DocVQA (DocVQA, validation)", 5349),
    ),
    "ocrbench": (
        _tsv("OCRBench", questions=1000, md5=("e953d98a987cc6e26ef717b61260b778",)),
        Table(("ocrbench", "OCRBench"), _patterns("test"), "echo840/OCRBench (test)", 1000),
    ),
    "cvbench": (
        _tsv(
            "CV-Bench-2D",
            "CV-Bench-3D",
            questions=2638,
            md5=("a7cff4cc2857cc237ee2b89e62bccb2d", "bb94c0d568d652d15b60e001ac40a170"),
        ),
        Table(("cvbench", "CV-Bench"), _patterns("test"), "nyu-visionx/CV-Bench (test)", 2638),
    ),
    "mmvp": (
        # the authors' own answers first: Cambrian, and so the paper, scores by them
        Pictures(("mmvp", "MMVP", ""), "MMVP/MMVP", 300),
        _tsv("MMVP", questions=300, md5=("8cb732b141a0cba5b42159df2839e557",)),
        Table(("mmvp", "MMVP"), _patterns("train"), "lmms-lab-eval/MMVP (train; four answers corrected)", 300),
    ),
    "naturalbench": (
        _tsv("NaturalBenchDataset", questions=7600, md5=("e5f724932972eaeb8a9099e6979606ec",), at=_NATURAL),
        Table(
            ("naturalbench", "NaturalBench-lmms-eval"),
            _patterns("test"),
            "BaiqiL/NaturalBench-lmms-eval (test)",
            7600,
            images=("Image", "image"),
        ),
        Table(
            ("naturalbench", "NaturalBench"),
            _patterns("train"),
            "BaiqiL/NaturalBench (train; 1900 rows of four questions)",
            7600,
            images=_FOUR_IMAGES,
        ),
    ),
}
"""Benchmark -> what is looked for, in this order."""


@dataclass(frozen=True, slots=True)
class Found:
    """A layout and its files, in order."""

    layout: Layout
    paths: tuple[Path, ...]
    kind: Literal["tsv", "parquet", "arrow", "csv"]


def find_files(benchmark: str, folder: Path) -> Found:
    """The first layout whose files lie in ``folder``.

    Raises:
        DataError: none does, or a part of one is missing; says what was looked for and where to get it.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder: --data (evaluate.data) is the folder of the benchmarks' files")
    for layout in LAYOUTS[benchmark]:
        found = _find(layout, folder)
        if found is not None:
            return found
    parts = [path for layout in LAYOUTS[benchmark] if isinstance(layout, Tsv) for path in _present(layout, folder)]
    half = f" (there is {', '.join(path.name for path in parts)}, and a part is missing)" if parts else ""
    raise DataError(f"{benchmark}: no files in {folder}{half}.\nLooked for:\n" + _wanted(benchmark))


def _wanted(benchmark: str) -> str:
    lines = []
    for layout in LAYOUTS[benchmark]:
        if isinstance(layout, Tsv):
            lines += [f"  {name}: {url} (md5 {md5})" for name, url, md5 in layout.parts]
        elif isinstance(layout, Pictures):
            where = " or ".join(f"{name}/{layout.table}" if name else layout.table for name in layout.folders)
            lines.append(f"  {where} with '{layout.pictures}/1.jpg', ...: Hugging Face data set {layout.hub}")
        else:
            where = " or ".join(f"{name}/" for name in layout.folders)
            lines.append(f"  {where} with parquet files or save_to_disk: Hugging Face data set {layout.hub}")
    return "\n".join(lines)


def _find(layout: Layout, folder: Path) -> Found | None:
    if isinstance(layout, Tsv):
        present = _present(layout, folder)
        return Found(layout, present, "tsv") if len(present) == len(layout.parts) else None
    for name in layout.folders:
        if isinstance(layout, Pictures):
            path = folder / name / layout.table
            if path.is_file():
                return Found(layout, (path,), "csv")
            continue
        for pattern in layout.patterns:
            paths = tuple(sorted(path for path in (folder / name).glob(pattern) if path.is_file()))
            if paths and _has_images(layout, paths[0]):
                return Found(layout, paths, "arrow" if paths[0].suffix == ".arrow" else "parquet")
    return None


def _has_images(layout: Table, path: Path) -> bool:
    """Two copies of a benchmark may use folders of one name; their columns differ."""
    columns = columns_of("arrow" if path.suffix == ".arrow" else "parquet", path)
    wanted = layout.images if layout.images == _FOUR_IMAGES else ()
    return all(name in columns for name in wanted) and any(name in columns for name in layout.images)


def _present(layout: Tsv, folder: Path) -> tuple[Path, ...]:
    return tuple(folder / name for name, _, _ in layout.parts if (folder / name).is_file())
