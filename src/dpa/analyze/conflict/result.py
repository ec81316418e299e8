"""What a measurement of the conflict says."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from dpa.analyze.conflict.intervals import Estimate
from dpa.analyze.conflict.phrases import Phrase
from dpa.analyze.conflict.proxy import Adaptation
from dpa.analyze.conflict.verdict import Verdict


@dataclass(frozen=True, slots=True)
class ClassConflict:
    """One class of tokens, on held-out captions."""

    name: str
    meaning: str
    tokens: int
    share_of_tokens: float
    prior: Estimate
    """Nats per token of this class under the LLM as it is."""
    gap: Estimate
    """Nats per token of this class."""
    share_of_gap: float | None
    """Of all nats that adaptation explains; None where the gap is not distinguishable from 0."""


@dataclass(frozen=True, slots=True)
class Conflict:
    """The measurement. Nats throughout; 95 % intervals by bootstrap over captions."""

    source: str
    records: int
    """Of the source."""
    left_out: dict[str, int]
    """Records that are no captions, and sampled captions that cannot be tokenised, by reason."""
    llm: str
    captions: int
    """In the sample."""
    tokens: int
    """Supervised tokens of the sample."""
    cut: int
    """Tokens beyond the longest length that were not read."""
    held_out: int
    """Captions that the proxy has not read; everything below ``prior`` is measured on them."""
    held_out_tokens: int
    prior: Estimate
    """Nats per token of the whole sample under the LLM as it is."""
    prior_held_out: Estimate
    proxy_held_out: Estimate
    """Nats per token under the proxy."""
    gap: Estimate
    """The conflict score, nats per token: ``prior_held_out - proxy_held_out``."""
    gap_per_caption: Estimate
    """The same, nats per caption."""
    share: Estimate
    """The same as a share of ``prior_held_out``: comparable between tokenizers."""
    gap_adapted: Estimate | None
    """Nats per token on the captions that the proxy has read; None with a given proxy."""
    classes: tuple[ClassConflict, ...]
    truth: tuple[ClassConflict, ...]
    """Visual and linguistic words, where the data say which is which."""
    phrases: tuple[Phrase, ...]
    min_phrase_count: int
    openings: tuple[Phrase, ...]
    opening_share: float
    """Of the held-out captions that begin with one of the three commonest openings."""
    adaptation: Adaptation | None
    proxy: str | None
    """The adapter that was given."""
    verdict: Verdict
    seed: int
    device: str
    dtype: str
    versions: dict[str, str]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``. But for ``seconds``, the same seed on the same machine gives the same."""
        return asdict(self)
