"""The audit's text half: every sample tokenised once, on all cores where there are many, remembered on disk."""

from __future__ import annotations

import io
import itertools
import json
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import transformers
from numpy.typing import NDArray

from dpa.data.chat import ENCODING_VERSION
from dpa.data.dataset import StageData
from dpa.data.loader import read_ahead, workers_for
from dpa.errors import DataError
from dpa.store import digest_of, fsync_folder

_CHUNK = 512
"""Samples."""
_SEGMENT = 32
"""Chunks that are kept together: what a pass that is stopped loses at most."""


@dataclass(frozen=True, slots=True)
class TextFacts:
    """Per sample of the stage (N of them)."""

    lengths: NDArray[np.int32]
    """int32 [N]; 0 for unusable samples."""
    supervised: NDArray[np.int32]
    """int32 [N]; supervised tokens."""
    cut: NDArray[np.int32]
    """int32 [N]; tokens beyond max_length."""
    problems: dict[int, str]
    """Number -> why it cannot be used."""


def text_facts(data: StageData, folder: Path, progress: Callable[[int], Any]) -> TextFacts:
    """Tokenises all samples, or reads what an earlier call found.

    Args:
        data: the stage.
        folder: where results are kept.
        progress: called with the number of samples done.

    Raises:
        OSError: the folder is not writable.
    """
    path = folder / f"text-{_key(data)[:40]}.npz"
    facts = _load(path, len(data))
    if facts is None:
        parts = path.with_suffix(".parts")
        facts = _compute(data, parts, progress)
        _save(path, facts)
        shutil.rmtree(parts)
    progress(len(data))
    return facts


def tokenizer_digest(tokenizer: Any) -> str:
    """Of everything that decides ids; not of padding and truncation, which calls change."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state |= {"padding": None, "truncation": None}
    return digest_of([type(tokenizer).__name__, state, {k: str(v) for k, v in tokenizer.special_tokens_map.items()}])


def _key(data: StageData) -> str:
    return digest_of(
        {
            "version": ENCODING_VERSION,
            "libraries": [transformers.__version__, tokenizers.__version__],
            "records": [source.digest for source in data.sources],
            "tokenizer": tokenizer_digest(data.tokenizer),
            "rules": asdict(data.rules),
            "format": data.format,
            "with_images": data.with_images,
            "document_start": data.document_start,
            "max_length": data.max_length,
            "marks": data.marks,
        }
    )


class _Chunks:
    """Number of a chunk -> facts of its samples; run in the workers."""

    def __init__(self, data: StageData) -> None:
        self._data = data

    def __len__(self) -> int:
        return -(-len(self._data) // _CHUNK)

    def __getitem__(self, number: int) -> TextFacts:
        indices = range(number * _CHUNK, min((number + 1) * _CHUNK, len(self._data)))
        lengths, supervised, cut = np.zeros((3, len(indices)), dtype=np.int32)
        problems = {}
        for place, index in enumerate(indices):
            try:
                encoded = self._data.encode(self._data.sample(index))
            except DataError as error:
                problems[index] = str(error)
            else:
                lengths[place] = len(encoded.input_ids)
                supervised[place] = sum(encoded.supervised)
                cut[place] = encoded.cut
        return TextFacts(lengths, supervised, cut, problems)


def _compute(data: StageData, parts: Path, progress: Callable[[int], Any]) -> TextFacts:
    """All chunks; what is done is kept in segments below ``parts``, so that a pass which was stopped continues."""
    parts.mkdir(exist_ok=True)
    chunks = _Chunks(data)
    segments = [range(start, min(start + _SEGMENT, len(chunks))) for start in range(0, len(chunks), _SEGMENT)]
    files = [parts / f"{segment.start}-{segment.stop}.npz" for segment in segments]
    sizes = [min(segment.stop * _CHUNK, len(data)) - segment.start * _CHUNK for segment in segments]
    facts = [_load(file, size) for file, size in zip(files, sizes, strict=True)]
    missing = [place for place, known in enumerate(facts) if known is None]
    done = sum(size for size, known in zip(sizes, facts, strict=True) if known is not None)
    keys = [number for place in missing for number in segments[place]]
    found: Iterator[TextFacts] = read_ahead(chunks, keys, workers_for(sum(sizes) - done))
    for place in missing:
        made = []
        for part in itertools.islice(found, len(segments[place])):
            made.append(part)
            done += len(part.lengths)
            progress(done)
        joined = _join(made)
        if len(segments) > 1:
            _save(files[place], joined)
        facts[place] = joined
    return _join([known for known in facts if known is not None])


def _join(parts: Sequence[TextFacts]) -> TextFacts:
    return TextFacts(
        lengths=np.concatenate([part.lengths for part in parts]),
        supervised=np.concatenate([part.supervised for part in parts]),
        cut=np.concatenate([part.cut for part in parts]),
        problems={index: reason for part in parts for index, reason in part.problems.items()},
    )


def _save(path: Path, facts: TextFacts) -> None:
    """One file, atomic."""
    problems = json.dumps(sorted(facts.problems.items())).encode()
    buffer = io.BytesIO()
    np.savez(
        buffer,
        lengths=facts.lengths,
        supervised=facts.supervised,
        cut=facts.cut,
        problems=np.frombuffer(problems, dtype=np.uint8),
    )
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        fsync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _load(path: Path, count: int) -> TextFacts | None:
    """None where there is nothing usable."""
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            problems = arrays["problems"].tobytes()
            facts = TextFacts(arrays["lengths"], arrays["supervised"], arrays["cut"], dict(json.loads(problems)))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    return facts if len(facts.lengths) == count else None
