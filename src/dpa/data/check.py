"""``dpa data check``: what a stage's data are, in figures, and whether training could start on them.

The figures come from the pass that training itself makes (:func:`dpa.data.audit.examine`), from the same caches: what
is counted here as unusable is what training leaves out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpa.data.audit import Examined, ImageCheck, Quarantined, refuse
from dpa.data.dataset import StageData
from dpa.data.records import Records
from dpa.data.shuffle import permutation
from dpa.data.tables import row_group_megabytes

HUGE_PIXELS = 25_000_000
"""Width x height above which an image is called huge: usable, but slow to decode (about 0.3 s and 100 MB)."""
SLOW_ROW_GROUP_MB = 32
"""A parquet file whose row groups hold more image bytes than this is slow to read at random."""
_BINS = 24
_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Spread:
    """How a number is spread over samples or images."""

    least: int
    median: int
    mean: float
    p95: int
    most: int
    edges: tuple[int, ...]
    """Of the histogram's bins, one more than there are bins; the last bin holds what is above the 99th percentile."""
    counts: tuple[int, ...]

    @staticmethod
    def of(values: NDArray[Any]) -> Spread | None:
        """None of no values."""
        if not len(values):
            return None
        least, most = int(values.min()), int(values.max())
        high = max(least + 1, int(np.percentile(values, 99)) + 1)
        edges = np.unique(np.linspace(least, high, min(_BINS, high - least + 1)).astype(np.int64))
        if most >= high:
            edges = np.append(edges, most + 1)
        counts, _ = np.histogram(values, bins=edges)
        return Spread(
            least=least,
            median=int(np.median(values)),
            mean=round(float(values.mean()), 1),
            p95=int(np.percentile(values, 95)),
            most=most,
            edges=tuple(edges.tolist()),
            counts=tuple(counts.tolist()),
        )


@dataclass(frozen=True, slots=True)
class Problem:
    """Samples that are left out for the same reason."""

    kind: str
    samples: int
    examples: tuple[dict[str, str], ...]
    """id, where, reason of the first ones."""


@dataclass(frozen=True, slots=True)
class SourceCheck:
    """One source of the stage."""

    path: str
    kind: str
    """``list``, ``lines``, ``parquet`` or ``arrow``."""
    files: int
    samples: int
    """That an epoch reads, repetitions included."""
    bad: int
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ImagesCheck:
    """The stage's images."""

    check: ImageCheck
    references: int
    """Images of all samples."""
    different: int
    """Different names."""
    problems: dict[str, int]
    """``image missing``, ``image unreadable`` ... -> number of different names."""
    duplicates: int
    """Names whose content another name has, too: what could be deleted without a loss."""
    duplicate_examples: tuple[tuple[str, ...], ...]
    """Names of one content each, the largest groups first."""
    huge: int
    """More than :data:`HUGE_PIXELS`, and not refused."""
    huge_examples: tuple[str, ...]
    width: Spread | None
    height: Spread | None


@dataclass(frozen=True, slots=True)
class StageCheck:
    """One stage's data."""

    stage: str
    format: str
    max_length: int
    samples: int
    with_image: int
    several_images: int
    text_only: int
    usable: int
    tokens: Spread | None
    """Per usable sample, image placeholders included, after cutting."""
    supervised: Spread | None
    """Supervised tokens per usable sample."""
    all_tokens: int
    supervised_tokens: int
    cut_samples: int
    """Usable samples that ``max_length`` shortens."""
    cut_tokens: int
    problems: tuple[Problem, ...]
    sources: tuple[SourceCheck, ...]
    images: ImagesCheck | None
    refusal: str | None
    """Why training would not start; None: it would."""
    examples: tuple[int, ...]
    """Numbers of usable samples to look at, drawn at random."""

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"can_train": self.refusal is None}


def check_stage(data: StageData, found: Examined, *, stage: str, max_bad_share: float, show: int = 12) -> StageCheck:
    """Counts.

    Args:
        data: the stage.
        found: what :func:`dpa.data.audit.examine` found in it.
        stage: its name.
        max_bad_share: of each source; more unusable samples refuse the run.
        show: samples to look at.
    """
    bad = found.quarantined(data)
    usable = np.ones(len(data), dtype=np.bool_)
    usable[list(found.problems)] = False
    counts = np.fromiter(map(len, data.images()), dtype=np.int32, count=len(data))
    lengths, supervised, cut = (
        column[usable] for column in (found.text.lengths, found.text.supervised, found.text.cut)
    )
    return StageCheck(
        stage=stage,
        format=data.format,
        max_length=data.max_length,
        samples=len(data),
        with_image=int((counts > 0).sum()),
        several_images=int((counts > 1).sum()),
        text_only=int((counts == 0).sum()),
        usable=len(lengths),
        tokens=Spread.of(lengths),
        supervised=Spread.of(supervised),
        all_tokens=int(lengths.sum(dtype=np.int64)),
        supervised_tokens=int(supervised.sum(dtype=np.int64)),
        cut_samples=int((cut > 0).sum()),
        cut_tokens=int(cut.sum(dtype=np.int64)),
        problems=_problems(bad),
        sources=_sources(data, bad),
        images=_images(found, int(counts.sum(dtype=np.int64))) if data.with_images else None,
        refusal=refuse(data, bad, max_bad_share),
        examples=_examples(usable, counts, show),
    )


def _problems(bad: Sequence[Quarantined]) -> tuple[Problem, ...]:
    kinds = Counter(item.kind for item in bad).most_common()
    return tuple(
        Problem(
            kind,
            count,
            tuple(
                {"id": item.id, "where": item.where, "reason": item.reason}
                for item in [item for item in bad if item.kind == kind][:_SHOWN]
            ),
        )
        for kind, count in kinds
    )


def _sources(data: StageData, bad: Sequence[Quarantined]) -> tuple[SourceCheck, ...]:
    places = np.searchsorted(np.array(data.starts), [item.index for item in bad], side="right") - 1
    per_source = np.bincount(places.astype(np.int64), minlength=len(data.sources))
    return tuple(
        SourceCheck(
            path=str(source.source),
            kind=source.files.kind,
            files=len(source.files.paths),
            samples=len(source),
            bad=int(count),
            notes=_notes(source),
        )
        for source, count in zip(data.sources, per_source, strict=True)
    )


def _notes(source: Records) -> tuple[str, ...]:
    tables = source.store.tables
    if tables is None or tables.kind != "parquet":
        return ()
    size = row_group_megabytes(tables.paths[0], tables.columns)
    if size <= SLOW_ROW_GROUP_MB:
        return ()
    return (
        f"a row group of {tables.paths[0].name} holds {size:.0f} MB of images, and each random read reads one: "
        f"training will wait for data; `dpa data convert {source.source} OUT` writes them as files",
    )


def _images(found: Examined, references: int) -> ImagesCheck:
    images = found.images
    names = [name for mine in images.names for name in mine]
    kinds = Counter(reason.partition(":")[0] for problems in images.problems for reason in problems.values())
    pixels = images.sizes.astype(np.int64).prod(axis=1)
    refused = np.zeros(len(names), dtype=np.bool_)
    start = 0
    for mine, problems in zip(images.names, images.problems, strict=True):
        if problems:
            refused[start : start + len(mine)] = [name in problems for name in mine]
        start += len(mine)
    huge = np.flatnonzero((pixels > HUGE_PIXELS) & ~refused)
    duplicates, groups = _duplicates(images.contents, names)
    known = pixels > 0
    return ImagesCheck(
        check=images.check,
        references=references,
        different=len(names),
        problems=dict(kinds.most_common()),
        duplicates=duplicates,
        duplicate_examples=groups,
        huge=len(huge),
        huge_examples=tuple(names[place] for place in huge[:_SHOWN]),
        width=Spread.of(images.sizes[known, 0]),
        height=Spread.of(images.sizes[known, 1]),
    )


def _duplicates(contents: NDArray[np.void], names: Sequence[str]) -> tuple[int, tuple[tuple[str, ...], ...]]:
    """How many contents come again, and the names of the most frequent ones."""
    present = np.flatnonzero(contents.view(np.uint8).reshape(-1, 16).any(axis=1))
    words = contents[present].view(np.uint64).reshape(-1, 2)  # void cannot be sorted
    order = np.lexsort((present, words[:, 1], words[:, 0]))
    ordered = words[order]
    new = np.append(True, (ordered[1:] != ordered[:-1]).any(axis=1)) if len(ordered) else np.zeros(0, dtype=np.bool_)
    starts = np.append(np.flatnonzero(new), len(ordered))
    sizes = np.diff(starts)
    largest = [place for place in np.argsort(-sizes, kind="stable")[:_SHOWN] if sizes[place] > 1]
    groups = tuple(
        tuple(names[present[order[at]]] for at in range(starts[place], min(starts[place] + _SHOWN, starts[place + 1])))
        for place in largest
    )
    return len(ordered) - len(sizes), groups


def _examples(usable: NDArray[np.bool_], counts: NDArray[np.int32], show: int) -> tuple[int, ...]:
    """With images first."""
    drawn = permutation(len(usable), seed=0, stream="samples to look at")
    drawn = drawn[usable[drawn]]
    with_image, without = drawn[counts[drawn] > 0], drawn[counts[drawn] == 0]
    few = min(len(without), max(show // 4, show - len(with_image)))
    return (*with_image[: show - few].tolist(), *without[:few].tolist())
