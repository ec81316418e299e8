"""One pass over a stage's data before anything is trained: what is usable, how long it is, and what it is exactly.

Legend: N samples of the stage, M samples kept.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from dpa.data.dataset import StageData
from dpa.data.image_check import check_images
from dpa.data.shuffle import Indices
from dpa.data.text_pass import TextFacts, text_facts
from dpa.errors import DataError
from dpa.store import digest_of, disk_errors

DECODE_UP_TO = 20_000
"""Images that are decoded completely; of more, only the headers are read (their bytes are read for the digest)."""
_SHOWN = 5

Progress = Callable[[int, int], None]
"""Called with (samples and images done, all of them)."""
ImageCheck = Literal["none", "header", "decoded"]


@dataclass(frozen=True, slots=True)
class Quarantined:
    """A sample that is left out."""

    index: int
    """Its number in the stage."""
    id: str
    where: str
    """File and record."""
    reason: str
    """``kind: details``; see :attr:`kind`."""

    @property
    def kind(self) -> str:
        """What is counted together: ``image missing``, ``no supervised token`` ..."""
        return self.reason.partition(":")[0]


@dataclass(frozen=True, slots=True)
class Audit:
    """What the stage trains on."""

    samples: int
    """N."""
    kept: Indices
    """int64 [M], ascending: train on ``stage_data.select(audit.kept)``."""
    lengths: NDArray[np.int32]
    """int32 [M]; tokens, image placeholders included, after cutting."""
    has_image: NDArray[np.bool_]
    """bool [M]."""
    labels: NDArray[np.int32]
    """int32 [M]; supervised tokens."""
    cut_samples: int
    """Kept samples that ``max_length`` shortened."""
    cut_tokens: int
    images: int
    """Different image files."""
    image_check: ImageCheck
    """Whether images were decoded completely, or their headers read (more than :data:`DECODE_UP_TO` images)."""
    quarantined: tuple[Quarantined, ...]
    digest: str
    """Of everything that training sees: records, kept samples, images' content. Paths and times play no part."""

    @property
    def supervised_tokens(self) -> int:
        """In all kept samples."""
        return int(self.labels.sum(dtype=np.int64))

    def summary(self) -> dict[str, Any]:
        """For manifests (JSON)."""
        return {
            "samples": self.samples,
            "kept": len(self.kept),
            "with_image": int(self.has_image.sum()),
            "tokens": int(self.lengths.sum(dtype=np.int64)),
            "supervised_tokens": self.supervised_tokens,
            "longest": int(self.lengths.max()),
            "cut_samples": self.cut_samples,
            "cut_tokens": self.cut_tokens,
            "images": self.images,
            "image_check": self.image_check,
            "digest": self.digest,
            "quarantined": len(self.quarantined),
            "quarantined_by_kind": dict(Counter(item.kind for item in self.quarantined).most_common()),
            "quarantined_first": [
                {"id": item.id, "where": item.where, "reason": item.reason} for item in self.quarantined[:_SHOWN]
            ],
        }


def audit(stage_data: StageData, *, max_bad_share: float, cache_dir: Path, progress: Progress | None = None) -> Audit:
    """Tokenises every sample, looks at every image, and says what is left out and why.

    Repeated calls read the results of the first from ``cache_dir``, as long as records, tokenizer, rules, format and
    length, and each image's path, size and modification time are the same.

    Args:
        stage_data: all samples of the stage.
        max_bad_share: of each source; a larger share (strictly) of unusable samples refuses the run.
        cache_dir: may be shared by processes and runs.
        progress: called now and then.

    Raises:
        DataError: too many samples of a source are unusable, or none is left; names counts and the first reasons.
        StorageError: the cache cannot be written.
    """
    folder = cache_dir / "audit"
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "audit.lock"):  # of several ranks one works, the others read what it found
            names = _image_names(stage_data)
            total = len(stage_data) + sum(map(len, names))
            text = text_facts(stage_data, folder, lambda done: progress and progress(done, total))
            images = _check(stage_data, names, cache_dir, lambda done: progress and progress(done, total))
    problems = _problems(stage_data, text, images)
    quarantined = [_quarantined(stage_data, index, reason) for index, reason in sorted(problems.items())]
    _refuse(stage_data, quarantined, max_bad_share)
    kept = np.delete(np.arange(len(stage_data), dtype=np.int64), sorted(problems))
    counts = np.fromiter(map(len, stage_data.images()), dtype=np.int64, count=len(stage_data))
    return Audit(
        samples=len(stage_data),
        kept=kept,
        lengths=text.lengths[kept],
        has_image=counts[kept] > 0,
        labels=text.supervised[kept],
        cut_samples=int((text.cut[kept] > 0).sum()),
        cut_tokens=int(text.cut[kept].sum(dtype=np.int64)),
        images=sum(map(len, names)),
        image_check=images.check,
        quarantined=tuple(quarantined),
        digest=_digest(stage_data, kept, images.digest),
    )


def _image_names(data: StageData) -> list[list[str]]:
    """Per source its different image paths, in order of first use."""
    if not data.with_images:
        return [[] for _ in data.sources]
    return [list(dict.fromkeys(name for names in source.images() for name in names)) for source in data.sources]


@dataclass(frozen=True, slots=True)
class _Images:
    """What the image pass found."""

    check: ImageCheck
    digest: str
    """Over the sources' (path, content) pairs."""
    problems: tuple[dict[str, str], ...]
    """Per source: path -> why it cannot be used."""


def _check(data: StageData, names: Sequence[Sequence[str]], cache_dir: Path, progress: Callable[[int], Any]) -> _Images:
    count = sum(map(len, names))
    decode = count <= DECODE_UP_TO
    digest = hashlib.sha256()
    problems: list[dict[str, str]] = []
    done = len(data)
    for source, mine in zip(data.sources, names, strict=True):
        found: dict[str, str] = {}
        digest.update(f"source of {len(mine)}\n".encode())
        facts = check_images(source.store, mine, cache_dir=cache_dir, max_pixels=data.max_image_pixels, decode=decode)
        for name, fact in zip(mine, facts, strict=True):
            digest.update(f"{json.dumps(name)} {fact.digest.hex()}\n".encode())
            problem = fact.problem or _thin(data, fact.width, fact.height, source.store.place(name).label)
            if problem is not None:
                found[name] = problem
            done += 1
            progress(done)
        problems.append(found)
    return _Images(
        check="none" if not count else "decoded" if decode else "header",
        digest=digest.hexdigest(),
        problems=tuple(problems),
    )


def _thin(data: StageData, width: int, height: int, label: str) -> str | None:
    assert data.transform is not None
    try:
        data.transform.check_size(width, height)
    except DataError as error:
        return f"{error} ({label})"
    return None


def _problems(data: StageData, text: TextFacts, images: _Images) -> dict[int, str]:
    """Number -> reason; where text and image are bad, the text's."""
    problems: dict[int, str] = {}
    if any(images.problems):
        for index, (bad, names) in enumerate(_with_source(data, images)):
            reasons = [bad[name] for name in names if name in bad]
            if reasons:
                problems[index] = reasons[0]
    return problems | text.problems


def _with_source(data: StageData, images: _Images) -> Iterator[tuple[dict[str, str], tuple[str, ...]]]:
    for source, bad in zip(data.sources, images.problems, strict=True):
        for names in source.images():
            yield bad, names


def _quarantined(data: StageData, index: int, reason: str) -> Quarantined:
    sample = data.sample(index)
    return Quarantined(index=index, id=sample.id, where=sample.where, reason=reason)


def _refuse(data: StageData, quarantined: Sequence[Quarantined], max_bad_share: float) -> None:
    for place, source in enumerate(data.sources):
        bad = [item for item in quarantined if data.starts[place] <= item.index < data.starts[place + 1]]
        share = len(bad) / len(source)
        if share > max_bad_share:
            raise DataError(
                f"{source.source}: {len(bad)} of {len(source)} samples cannot be used, {share:.2%}; allowed is "
                f"{max_bad_share:.2%} (data.max_bad_share).{_shown(bad)}"
            )
    if len(quarantined) == len(data):
        names = ", ".join(str(source.source) for source in data.sources)
        raise DataError(f"{names}: none of {len(data)} samples can be used.{_shown(quarantined)}")


def _shown(bad: Sequence[Quarantined]) -> str:
    counts = Counter(item.kind for item in bad).most_common()
    kinds = ", ".join(f"{count} x {kind}" for kind, count in counts)
    lines = [f"\n  sample {item.id!r} ({item.where}): {item.reason}" for item in bad[:_SHOWN]]
    more = f"\n  and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
    return f" {kinds}:{''.join(lines)}{more}"


def _digest(data: StageData, kept: Indices, images: str) -> str:
    content = {
        "records": [source.digest for source in data.sources],
        "kept": hashlib.sha256(kept.astype("<i8").tobytes()).hexdigest(),
        "images": images,
    }
    # other pixels; named only where it is on, so that it makes nothing anew where it is off
    return digest_of(content | ({"reduced_decode": True} if data.reduced_decode else {}))
