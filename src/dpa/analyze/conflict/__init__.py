"""Language prior conflict before any training: how far the captions' language is from the LLM's (docs/conflict.md)."""

from dpa.analyze.conflict.captions import Caption, CaptionSample, read_captions, sample_of
from dpa.analyze.conflict.measure import measure_conflict
from dpa.analyze.conflict.result import Conflict
from dpa.analyze.conflict.settings import ConflictSettings

__all__ = [
    "Caption",
    "CaptionSample",
    "Conflict",
    "ConflictSettings",
    "measure_conflict",
    "read_captions",
    "sample_of",
]
