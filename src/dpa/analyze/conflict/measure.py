"""``dpa conflict``: sample -> surprise under the LLM -> a brief proxy -> surprise under it -> what lies between.

Legend: T tokens of a caption, G captions, K figures.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from dpa.analyze.conflict.captions import CaptionSample, Progress
from dpa.analyze.conflict.intervals import Estimate, Floats, ratio_intervals
from dpa.analyze.conflict.passes import Surprise, batch_tokens, surprise_of
from dpa.analyze.conflict.phrases import least_count, opening_share, repeated_openings, surprising_phrases
from dpa.analyze.conflict.proxy import Adaptation, adapt
from dpa.analyze.conflict.result import ClassConflict, Conflict
from dpa.analyze.conflict.settings import ConflictSettings
from dpa.analyze.conflict.tokens import TokenCaption, tokens_of
from dpa.analyze.conflict.verdict import judge
from dpa.analyze.conflict.words import CLASSES
from dpa.data.shuffle import permutation
from dpa.errors import DataError, UserError
from dpa.models.digest import digest_of_part
from dpa.models.families import family_of, text_rules
from dpa.models.lora import merge_adapter
from dpa.models.parts import load_llm, load_tokenizer, resolve_part
from dpa.models.settings import ModelSettings
from dpa.train.determinism import controlled
from dpa.train.settings import TrainSettings
from dpa.types import TextRules

LEAST_CAPTIONS = 4
"""Different ones: two for the proxy, two to measure on."""
_TRUTH = {
    "visual": "words that say what is in the picture (the data's own spans)",
    "linguistic": "all other words: how it is said",
}
_WIDTH = 5
"""Figures of the whole that ``_figures`` puts before those of the classes."""


def measure_conflict(
    sample: CaptionSample,
    model: ModelSettings,
    settings: ConflictSettings | None = None,
    *,
    device: str = "auto",
    progress: Progress | None = None,
) -> Conflict:
    """Measures the language prior conflict of captions and an LLM (docs/conflict.md).

    Half of the captions adapts a proxy (or one is given), the other half is measured with and without it. Captions with
    the same text lie in the same half. On a CPU the same seed gives the same numbers. torch's global generators,
    threads and flags are put back.

    Args:
        sample: from :func:`read_captions`, or ``sample_of`` captions in memory.
        model: its LLM counts alone.
        settings: None: the defaults.
        device: ``auto``, or a name of torch's (``cuda:1``). bf16 on CUDA where it has it, float32 elsewhere.
        progress: called with what is being done, how much is done, and how much there is.

    Raises:
        DataError: fewer than ``LEAST_CAPTIONS`` different captions can be used.
        ModelError: the LLM or the proxy cannot be loaded, or do not belong together.
        UserError: no such device, or its memory is too small.
    """
    began = time.perf_counter()
    settings = ConflictSettings() if settings is None else settings
    where = device_of(device)
    tokenizer = load_tokenizer(model)
    dtype = _dtype_of(where)
    llm = load_llm(model, dtype=dtype)
    rules = text_rules(family_of(llm.config, tokenizer), tokenizer, tower_tokens=1)
    captions, refused = tokens_of(sample.captions, tokenizer, rules, max_length=_longest(llm, settings))
    left_out = dict(sample.left_out)
    for reason, count in refused.items():
        left_out[reason] = left_out.get(reason, 0) + count
    _check(captions, sample, left_out, given_proxy=settings.proxy is not None)
    adapted, held_out = halves(captions, settings)
    with controlled(TrainSettings(), where, low_precision=dtype != torch.float32):
        run = _Run(llm.to(where), model, rules, settings, where, dtype, progress)  # type: ignore[arg-type]
        prior = run.surprise([*adapted, *held_out], "reading as the LLM")
        proxy, adaptation = run.proxy(adapted)
        after = run.surprise([*adapted, *held_out], "reading as the proxy", proxy)
    split = len(adapted)
    known = [~(np.isnan(first) | np.isnan(second)) for first, second in zip(prior, after, strict=True)]
    gap = [first - second for first, second in zip(prior, after, strict=True)]
    tokens = sum(int(item.sum()) for item in known)
    least = least_count(len(held_out), settings.min_phrase_count)
    figures = _figures(held_out, prior[split:], gap[split:], known[split:], settings.seed)
    whole = _mean(prior, known, settings.seed)
    gap_adapted = _mean(gap[:split], known[:split], settings.seed) if adapted else None
    return Conflict(
        source=sample.source,
        records=sample.total,
        left_out=left_out,
        llm=model.llm,
        captions=len(captions),
        tokens=tokens,
        cut=sum(caption.alone.cut for caption in captions),
        held_out=len(held_out),
        held_out_tokens=sum(int(item.sum()) for item in known[split:]),
        prior=whole,
        gap_adapted=gap_adapted,
        **figures,
        phrases=tuple(surprising_phrases(held_out, prior[split:], gap[split:], least=least)),
        min_phrase_count=least,
        openings=tuple(repeated_openings(held_out, prior[split:], gap[split:])),
        opening_share=opening_share(held_out),
        adaptation=adaptation,
        proxy=None if settings.proxy is None else str(settings.proxy),
        verdict=judge(
            figures["share"],
            figures["gap"],
            gap_adapted,
            records=sample.total,
            steps=None if adaptation is None else adaptation.steps,
        ),
        seed=settings.seed,
        device=_name_of(where),
        dtype=str(dtype).removeprefix("torch."),
        versions={name: version(name) for name in ("dpa", "torch", "transformers", "peft")},
        seconds=time.perf_counter() - began,
    )


def halves(
    captions: Sequence[TokenCaption], settings: ConflictSettings
) -> tuple[list[TokenCaption], list[TokenCaption]]:
    """What the proxy reads and what is measured; different texts are dealt out. A given proxy reads nothing."""
    if settings.proxy is not None:
        return [], list(captions)
    texts = list(dict.fromkeys(caption.caption.text for caption in captions))
    order = permutation(len(texts), seed=settings.seed, stream="conflict halves")
    read = {texts[place] for place in order[: len(texts) // 2]}
    return (
        [caption for caption in captions if caption.caption.text in read],
        [caption for caption in captions if caption.caption.text not in read],
    )


def device_of(name: str) -> torch.device:
    """
    Raises:
        UserError: torch knows no such device, or it is not there.
    """
    if name == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"device {name!r}: {str(error).splitlines()[0]}; choose auto, cpu, or cuda") from None
    return device


class _Run:
    """The passes of one measurement, on one device."""

    def __init__(
        self,
        llm: PreTrainedModel,
        model: ModelSettings,
        rules: TextRules,
        settings: ConflictSettings,
        device: torch.device,
        dtype: torch.dtype,
        progress: Progress | None,
    ) -> None:
        self.llm, self.model, self.rules, self.settings = llm, model, rules, settings
        self.device, self.dtype = device, dtype
        self.budget = batch_tokens(device, settings.tokens_per_batch)
        self._progress = progress

    def surprise(self, captions: Sequence[TokenCaption], title: str, llm: Any = None) -> list[Surprise]:
        return surprise_of(
            self.llm if llm is None else llm,
            captions,
            self.rules,
            device=self.device,
            tokens_per_batch=self.budget,
            autocast=self._autocast,
            progress=self._bar(title),
        )

    def proxy(self, captions: Sequence[TokenCaption]) -> tuple[Any, Adaptation | None]:
        """The LLM with an adapter; the LLM itself is no longer the original after it."""
        if self.settings.proxy is not None:
            digest = digest_of_part(resolve_part(self.model.llm), self.model.llm_revision)
            merge_adapter(self.llm, self.settings.proxy, base_digest=digest)
            return self.llm, None
        return adapt(
            self.llm,
            captions,
            self.rules,
            self.settings,
            device=self.device,
            tokens_per_batch=self.budget,
            autocast=self._autocast,
            progress=self._bar("adapting a proxy"),
        )

    @property
    def _autocast(self) -> torch.dtype | None:
        return None if self.dtype == torch.float32 else self.dtype

    def _bar(self, title: str) -> Callable[[int, int], None] | None:
        shown = self._progress
        return None if shown is None else lambda done, total: shown(title, done, total)


def _dtype_of(device: torch.device) -> torch.dtype:
    """bf16 on CUDA where it has it, as ``train.precision: auto``."""
    low = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if low else torch.float32


def _name_of(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"


def _longest(llm: PreTrainedModel, settings: ConflictSettings) -> int:
    """Tokens of a caption that the LLM has positions for; one is the placeholder's."""
    config = llm.config.get_text_config().to_dict()
    return min(settings.max_length, int(config.get("max_position_embeddings", settings.max_length + 1)) - 1)


def _check(
    captions: Sequence[TokenCaption], sample: CaptionSample, left_out: dict[str, int], *, given_proxy: bool
) -> None:
    different = len({caption.caption.text for caption in captions})
    least = LEAST_CAPTIONS // 2 if given_proxy else LEAST_CAPTIONS
    if different >= least:
        return
    why = "; ".join(f"{count} x {reason}" for reason, count in sorted(left_out.items()))
    need = "to measure on" if given_proxy else "half for the proxy, half to measure on"
    raise DataError(
        f"{sample.source}: {len(captions)} usable captions, {different} different, of {sample.total} records; at least "
        f"{least} different ones are needed ({need}). {f'Left out: {why}. ' if why else ''}"
        "Give the captions of stage 2 (one answer a record, docs/data.md)"
    )


def _mean(values: Sequence[Surprise], known: Sequence[Any], seed: int) -> Estimate:
    """Over tokens."""
    top_G1 = np.array([[item[here].sum()] for item, here in zip(values, known, strict=True)])
    bottom_G1 = np.array([[float(here.sum())] for here in known])
    return ratio_intervals(top_G1, bottom_G1, seed=seed)[0]


def _figures(
    captions: Sequence[TokenCaption],
    prior: Sequence[Surprise],
    gap: Sequence[Surprise],
    known: Sequence[Any],
    seed: int,
) -> dict[str, Any]:
    """Everything that has an interval on the held-out captions, from the same resamples."""
    groups: list[tuple[str, str, list[Any]]] = []
    for name, meaning in CLASSES.items():
        groups.append((name, meaning, [np.array([kind == name for kind in item.kinds]) for item in captions]))
    truth = [] if any(item.visual is None for item in captions) else list(_TRUTH.items())
    for label, meaning in truth:
        wanted = label == "visual"
        groups.append((label, meaning, [np.array([seen is wanted for seen in item.visual or ()]) for item in captions]))
    tops: list[list[float]] = []
    bottoms: list[list[float]] = []
    for place, here in enumerate(known):
        base, gained, count = prior[place][here].sum(), gap[place][here].sum(), float(here.sum())
        top, bottom = [base, base - gained, gained, gained, gained], [count, count, count, 1.0, base]
        assert len(top) == _WIDTH
        for _, _, masks in groups:
            inside = here & masks[place]
            top += [prior[place][inside].sum(), gap[place][inside].sum()]
            bottom += [float(inside.sum())] * 2
        tops.append(top)
        bottoms.append(bottom)
    top_GK, bottom_GK = np.array(tops), np.array(bottoms)
    found = ratio_intervals(top_GK, bottom_GK, seed=seed)
    classes = _classes([(name, meaning) for name, meaning, _ in groups], found, top_GK, bottom_GK)
    return {
        "prior_held_out": found[0],
        "proxy_held_out": found[1],
        "gap": found[2],
        "gap_per_caption": found[3],
        "share": found[4],
        "classes": tuple(item for item in classes if item.name in CLASSES),
        "truth": tuple(item for item in classes if item.name in _TRUTH),
    }


def _classes(
    names: Sequence[tuple[str, str]], found: Sequence[Estimate], top_GK: Floats, bottom_GK: Floats
) -> list[ClassConflict]:
    """Classes that occur."""
    total_gap, total_tokens = top_GK[:, 2].sum(), bottom_GK[:, 2].sum()
    is_there = found[2].low > 0
    classes = []
    for place, (name, meaning) in enumerate(names):
        column = _WIDTH + 2 * place
        tokens = int(bottom_GK[:, column].sum())
        if tokens:
            share = float(top_GK[:, column + 1].sum() / total_gap) if is_there else None
            classes.append(
                ClassConflict(name, meaning, tokens, tokens / total_tokens, found[column], found[column + 1], share)
            )
    return classes
