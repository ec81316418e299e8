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
from dpa.data.records import Records
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
    image_counts: NDArray[np.int32]
    """int32 [M]; images per sample."""
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
    def has_image(self) -> NDArray[np.bool_]:
        """bool [M]."""
        return self.image_counts > 0

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
    found = examine(stage_data, cache_dir=cache_dir, progress=progress)
    quarantined = found.quarantined(stage_data)
    refusal = refuse(stage_data, quarantined, max_bad_share)
    if refusal is not None:
        raise DataError(refusal)
    text = found.text
    kept = np.delete(np.arange(len(stage_data), dtype=np.int64), sorted(found.problems))
    counts = np.fromiter(map(len, stage_data.images()), dtype=np.int32, count=len(stage_data))
    return Audit(
        samples=len(stage_data),
        kept=kept,
        lengths=text.lengths[kept],
        image_counts=counts[kept],
        labels=text.supervised[kept],
        cut_samples=int((text.cut[kept] > 0).sum()),
        cut_tokens=int(text.cut[kept].sum(dtype=np.int64)),
        images=sum(map(len, found.images.names)),
        image_check=found.images.check,
        quarantined=quarantined,
        digest=_digest(stage_data, kept, found.images.digest),
    )


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """What is known about the U different images of a stage (source by source, in order of first use)."""

    names: list[list[str]]
    """Per source."""
    check: ImageCheck
    digest: str
    """Over the sources' (path, content) pairs."""
    problems: tuple[dict[str, str], ...]
    """Per source: path -> why it cannot be used."""
    contents: NDArray[np.void]
    """[U]; 16 bytes each, digest of the file's content; zero where there is none."""
    sizes: NDArray[np.int32]
    """int32 [U, 2]; width and height as stored; 0 where unknown."""


@dataclass(frozen=True, slots=True)
class Examined:
    """What one pass over a stage found; nothing is refused yet."""

    text: TextFacts
    images: ImageFacts
    problems: dict[int, str]
    """Number -> why the sample cannot be used; where text and image are bad, the text's."""

    def quarantined(self, data: StageData) -> tuple[Quarantined, ...]:
        """The same with names, in order."""
        return tuple(_quarantined(data, index, reason) for index, reason in sorted(self.problems.items()))


def examine(
    data: StageData, *, cache_dir: Path, progress: Progress | None = None, decode: bool | None = None
) -> Examined:
    """Tokenises every sample and looks at every image; :func:`audit` without a verdict.

    Args:
        data: the stage.
        cache_dir: may be shared by processes and runs; what was found before is read there.
        progress: called now and then.
        decode: images completely (True), their headers alone (False), by their number (None).

    Raises:
        StorageError: the cache cannot be written.
    """
    folder = cache_dir / "audit"
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "audit.lock"):  # of several ranks one works, the others read what it found
            names = _image_names(data)
            total = len(data) + sum(map(len, names))
            text = text_facts(data, folder, lambda done: progress and progress(done, total))
            images = _check(data, names, cache_dir, lambda done: progress and progress(done, total), decode)
    return Examined(text, images, _problems(data, text, images))


def _image_names(data: StageData) -> list[list[str]]:
    """Per source its different image paths, in order of first use."""
    if not data.with_images:
        return [[] for _ in data.sources]
    return [list(dict.fromkeys(name for names in source.images() for name in names)) for source in data.sources]


def _check(
    data: StageData,
    names: list[list[str]],
    cache_dir: Path,
    progress: Callable[[int], Any],
    decode: bool | None,
) -> ImageFacts:
    count = sum(map(len, names))
    if decode is None:
        decode = count <= DECODE_UP_TO
    digest = hashlib.sha256()
    problems: list[dict[str, str]] = []
    contents, sizes, done = bytearray(count * 16), np.zeros((count, 2), dtype=np.int32), 0
    for source, mine in zip(data.sources, names, strict=True):
        found: dict[str, str] = {}
        digest.update(f"source of {len(mine)}\n".encode())
        facts = check_images(source.store, mine, cache_dir=cache_dir, max_pixels=data.max_image_pixels, decode=decode)
        for name, fact in zip(mine, facts, strict=True):
            digest.update(f"{json.dumps(name)} {fact.digest.hex()}\n".encode())
            contents[done * 16 : done * 16 + len(fact.digest)] = fact.digest
            sizes[done] = fact.width, fact.height
            problem = fact.problem or _thin(data, fact.width, fact.height, source, name)
            if problem is not None:
                found[name] = problem
            done += 1
            progress(len(data) + done)
        problems.append(found)
    return ImageFacts(
        names=names,
        check="none" if not count else "decoded" if decode else "header",
        digest=digest.hexdigest(),
        problems=tuple(problems),
        contents=np.frombuffer(bytes(contents), dtype="V16"),
        sizes=sizes,
    )


def _thin(data: StageData, width: int, height: int, source: Records, name: str) -> str | None:
    assert data.transform is not None
    try:
        data.transform.check_size(width, height)
    except DataError as error:
        return f"{error} ({source.store.place(name).label})"
    return None


def _problems(data: StageData, text: TextFacts, images: ImageFacts) -> dict[int, str]:
    """Number -> reason; where text and image are bad, the text's."""
    problems: dict[int, str] = {}
    if any(images.problems):
        for index, (bad, names) in enumerate(_with_source(data, images)):
            reasons = [bad[name] for name in names if name in bad]
            if reasons:
                problems[index] = reasons[0]
    return problems | text.problems


def _with_source(data: StageData, images: ImageFacts) -> Iterator[tuple[dict[str, str], tuple[str, ...]]]:
    for source, bad in zip(data.sources, images.problems, strict=True):
        for names in source.images():
            yield bad, names


def _quarantined(data: StageData, index: int, reason: str) -> Quarantined:
    sample = data.sample(index)
    return Quarantined(index=index, id=sample.id, where=sample.where, reason=reason)


def refuse(data: StageData, quarantined: Sequence[Quarantined], max_bad_share: float) -> str | None:
    """Why training could not start on these data; None where it could.

    Args:
        data: the stage.
        quarantined: its unusable samples.
        max_bad_share: of each source; see :func:`audit`.
    """
    for place, source in enumerate(data.sources):
        bad = [item for item in quarantined if data.starts[place] <= item.index < data.starts[place + 1]]
        share = len(bad) / len(source)
        if share > max_bad_share:
            return (
                f"{source.source}: {len(bad)} of {len(source)} samples cannot be used, {share:.2%}; allowed is "
                f"{max_bad_share:.2%} (data.max_bad_share).{_shown(bad)}"
            )
    if len(quarantined) == len(data):
        names = ", ".join(str(source.source) for source in data.sources)
        return f"{names}: none of {len(data)} samples can be used.{_shown(quarantined)}"
    return None


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
