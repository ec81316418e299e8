"""Why does a token count? Each token's probability with and without its image, its relevance, and its weight.

The numbers are those of training: the samples go through ``data.chat`` and ``data.collate``, the passes are
``models.contrast.contrast``, relevance and weights are ``dpa.objectives``. ``explain_page`` and ``explain_figure`` draw
them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers.decoders import DecodeStream
from torch import Tensor

from dpa.analyze.truth import visual_tokens
from dpa.data.chat import Encoded, encode_chat, encode_plain
from dpa.data.collate import collate
from dpa.data.dataset import Item
from dpa.data.images import ImageMode, ImageTransform, load_image
from dpa.data.samples import IMAGE_MARKER, Sample, Spans, Turn
from dpa.errors import DataError, UserError
from dpa.models.checkpoint_io import load_checkpoint
from dpa.models.contrast import contrast
from dpa.models.foreign import checkpoint_folder
from dpa.models.proxy import merge_proxy
from dpa.models.text_pass import TextPositions
from dpa.models.vlm import Vlm
from dpa.objectives import OBJECTIVES, objective, relevance, roc_auc, token_weights, weight_health, weight_stats

KINDS = tuple(name for name, row in OBJECTIVES.items() if row.needs_without)
"""Objectives that compare with the text alone; uniform has nothing to explain."""
MAX_LENGTH = 8192
"""Tokens, image placeholders included; a longer text is cut."""
MAX_IMAGE_PIXELS = 100_000_000


@dataclass(frozen=True, slots=True)
class Rule:
    """How relevance becomes a weight. From :func:`rule_of`."""

    kind: str
    minimum: float
    maximum: float
    window: int
    text_positions: TextPositions


def rule_of(
    kind: str = "cmo",
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    window: int | None = None,
    text_positions: TextPositions = "original",
) -> Rule:
    """A rule with the objective's own bounds and window where none are given (cmo: the paper's 0.05, 0.5 and 3).

    Raises:
        UserError: a kind that contrasts nothing, bounds in the wrong order, an even window.
    """
    if kind not in KINDS:
        raise UserError(f"kind {kind!r}: choose {', '.join(KINDS)}")
    row = objective(kind)
    low, high = row.minimum if minimum is None else minimum, row.maximum if maximum is None else maximum
    width = row.window if window is None else window
    if not 0 <= low <= high or width < 1 or width % 2 == 0:
        raise UserError(
            f"kind {kind}: bounds {low} and {high}, window {width}: need 0 <= minimum <= maximum, odd window"
        )
    return Rule(kind, low, high, width, text_positions)


@dataclass(frozen=True, slots=True)
class Token:
    """One supervised token."""

    text: str
    """What it adds to the text; empty for a token that holds a part of a character only."""
    logp_with: float
    """Nats, with the image."""
    logp_without: float | None
    """Nats, from the text before it alone; None: there is no such prediction (nothing precedes the image)."""
    relevance: float | None
    """Before bounds and smoothing; None as ``logp_without``."""
    weight: float
    """After clamp and smoothing: what multiplies its loss in training."""
    segment: int
    """Which answer it belongs to, from 0."""
    visual: bool | None = None
    """The truth, where it is known."""

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "text": self.text,
            "logp_with": self.logp_with,
            "logp_without": self.logp_without,
            "relevance": self.relevance,
            "weight": self.weight,
            "segment": self.segment,
            "visual": self.visual,
        }


@dataclass(frozen=True, slots=True)
class Health:
    """Some tokens in a few numbers."""

    tokens: int
    mean_relevance: float | None
    """Over tokens whose relevance is known."""
    mean_weight: float
    share_at_minimum: float
    """Tokens whose weight is the lower bound (metrics.jsonl's ``share_at_minimum``)."""
    share_at_maximum: float
    auc: float | None
    """ROC-AUC of relevance against the truth; None without truth."""

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "tokens": self.tokens,
            "mean_relevance": self.mean_relevance,
            "mean_weight": self.mean_weight,
            "share_at_minimum": self.share_at_minimum,
            "share_at_maximum": self.share_at_maximum,
            "auc": self.auc,
        }


@dataclass(frozen=True, slots=True)
class Explanation:
    """One text about one image (or a conversation about some), as one model sees it."""

    checkpoint: str
    """How the model is called."""
    rule: Rule
    sample: str
    """What is explained: an image file, or a sample's name and place."""
    prompts: tuple[str, ...]
    """Per answer what was asked before it; empty text for a caption, which has no prompt."""
    pictures: tuple[Image.Image, ...]
    """As stored; the model sees them ``image_mode``."""
    image_mode: ImageMode
    tokens: tuple[Token, ...]

    @property
    def text(self) -> str:
        """All that was explained."""
        return "".join(token.text for token in self.tokens)

    @property
    def health(self) -> Health:
        """Over all tokens."""
        return health_of([self])

    def html(self, *others: Explanation) -> str:
        """A page of its own; ``others`` are the same sample under other models, side by side, in one colour scale."""
        from dpa.analyze.explain_page import page  # the page knows explanations, not the other way round

        return page([(self, *others)])

    def png(self, path: Path, *others: Explanation) -> None:
        """A picture for a paper (300 dpi). Raises StorageError, UserError where it cannot be written."""
        from dpa.analyze.explain_figure import write_figure

        write_figure(path, (self, *others))

    def to_dict(self) -> dict[str, Any]:
        """For JSON: everything but the pixels."""
        return {
            "checkpoint": self.checkpoint,
            "sample": self.sample,
            "kind": self.rule.kind,
            "minimum": self.rule.minimum,
            "maximum": self.rule.maximum,
            "window": self.rule.window,
            "text_positions": self.rule.text_positions,
            "image_mode": self.image_mode,
            "prompts": list(self.prompts),
            "text": self.text,
            "health": self.health.to_dict(),
            "tokens": [token.to_dict() for token in self.tokens],
        }


def explain(
    checkpoint: str | Path | Vlm,
    image: Path | Image.Image,
    text: str,
    *,
    prompt: str | None = None,
    kind: str = "cmo",
    proxy: Path | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
    window: int | None = None,
    text_positions: TextPositions = "original",
    visual_spans: Spans | None = None,
    name: str | None = None,
) -> Explanation:
    """Relevance and weight of each token of a text about an image.

    Args:
        checkpoint: folder or hub id of a LLaVA that this library opens, or one in memory.
        image: file or picture.
        text: a caption (stage 2's format: image, caption, newline), or with ``prompt`` the answer to it.
        prompt: a user's turn after the image, in the LLM's chat template (stage 3's format).
        kind: ``cmo``, ``cal`` or ``prior``. prior reads the probability without image alone, as its paper does.
        proxy: adapter that is merged into the LLM before either pass: the model of stage 2.
        minimum, maximum: bounds of the weights; None: the objective's (cmo: 0.05 and 0.5, the paper's).
        window: width of the moving mean in tokens, odd; None: the objective's (cmo and cal 3, prior 1).
        text_positions: position ids of the pass without image.
        visual_spans: the truth, as character ranges of ``text``.
        name: how the model is called in pages; None: the folder's name.

    Raises:
        DataError: the image cannot be read, or the text has no tokens.
        ModelError: no LLaVA (no image token), or the proxy of another LLM.
        UserError: unknown kind, wrong bounds.
    """
    rule = rule_of(kind, minimum=minimum, maximum=maximum, window=window, text_positions=text_positions)
    if not text.strip():
        raise DataError("the text is empty: there is no token to explain")
    picture = image if isinstance(image, Image.Image) else load_image(image, max_pixels=MAX_IMAGE_PIXELS)
    sample = Sample(
        id="image" if isinstance(image, Image.Image) else image.name,
        turns=(Turn("user", f"{IMAGE_MARKER}\n{prompt or ''}".strip()), Turn("assistant", text)),
        images=("image",),
        where="picture in memory" if isinstance(image, Image.Image) else str(image),
        visual_spans=visual_spans,
    )
    if isinstance(checkpoint, Vlm):
        vlm = checkpoint
        if proxy is not None:
            raise UserError("a proxy is merged into a checkpoint that is read from its folder: give the folder's path")
    else:
        vlm = open_vlm(checkpoint, proxy=proxy)
    known = name if name is not None else "model" if isinstance(checkpoint, Vlm) else name_of(checkpoint, proxy)
    return explain_sample(vlm, sample, (picture,), rule, checkpoint=known, plain=prompt is None, max_length=MAX_LENGTH)


def open_vlm(source: str | Path, *, proxy: Path | None = None) -> Vlm:
    """A checkpoint on this machine's accelerator, as stored; without one in float32, as training would compute there.

    Raises:
        ModelError: see :func:`explain`.
    """
    folder = checkpoint_folder(str(source))
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    vlm = load_checkpoint(folder, dtype=torch.float32 if accelerator is None else None)
    if proxy is not None:
        merge_proxy(vlm, proxy, checkpoint=folder)
    return to_accelerator(vlm)


def to_accelerator(vlm: Vlm) -> Vlm:
    """Moves the model there if there is one."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None:
        vlm.model.to(accelerator)  # type: ignore[arg-type]
    return vlm


def name_of(source: str | Path, proxy: Path | None = None) -> str:
    """Short, and different for folders that are all called ``checkpoint``."""
    parts = [part for part in Path(source).parts if part not in ("/", "..", ".", "runs")]
    if len(parts) > 1 and parts[-1] == "checkpoint":
        parts = parts[:-1]
    return "/".join(parts[-2:]) + (" + proxy" if proxy is not None else "")


def transform_of(vlm: Vlm, *, max_pixels: int) -> ImageTransform:
    """Pixels as the checkpoint's own processor makes them."""
    config: Any = vlm.model.config
    processor = vlm.processor.image_processor
    mode: ImageMode = "pad" if getattr(processor, "do_pad", False) else "crop"
    return ImageTransform(processor, mode, int(config.vision_config.image_size), max_pixels=max_pixels)


def explain_sample(
    vlm: Vlm,
    sample: Sample,
    pictures: Sequence[Image.Image],
    rule: Rule,
    *,
    checkpoint: str,
    plain: bool,
    max_length: int,
    max_pixels: int = MAX_IMAGE_PIXELS,
) -> Explanation:
    """A sample of training data as it would be trained on.

    Args:
        pictures: the sample's, in order; at least one.
        checkpoint: the model's name.
        plain: stage 2's format, else the chat template.
        max_length: tokens.

    Raises:
        DataError: the sample cannot be used; the reason alone.
    """
    transform = transform_of(vlm, max_pixels=max_pixels)
    if plain:
        encoded = encode_plain(sample, vlm.tokenizer, vlm.rules, max_length=max_length, with_image=True)
    else:
        encoded = encode_chat(sample, vlm.tokenizer, vlm.rules, max_length=max_length)
    pixels_KCRR = torch.stack([transform(picture) for picture in pictures])
    item = Item(encoded=encoded, pixel_values=pixels_KCRR, sample_id=sample.id, where=sample.where)
    tokens = _tokens(vlm, item, rule)
    asked, answers = _turns(sample, plain)
    return Explanation(
        checkpoint=checkpoint,
        rule=rule,
        sample=sample.where if sample.id in sample.where else f"{sample.id} ({sample.where})",
        prompts=asked,
        pictures=tuple(pictures),
        image_mode=transform.mode,
        tokens=tuple(_with_truth(tokens, answers, sample.visual_spans)),
    )


def _turns(sample: Sample, plain: bool) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Per answer what was asked (markers left out), and the answer."""
    asked: list[str] = []
    answers: list[str] = []
    before: list[str] = []
    for turn in sample.turns:
        if turn.role == "assistant":
            asked.append("" if plain else "\n".join(before))
            answers.append(turn.text)
            before = []
        else:
            before.append(turn.text.replace(IMAGE_MARKER, "").strip())
    return tuple(asked), tuple(answers)


def _tokens(vlm: Vlm, item: Item, rule: Rule) -> list[Token]:
    """One batch of one sample through both passes."""
    model: Any = vlm.model
    batch = collate([item], vlm.rules).to(model.device)
    logits = objective(rule.kind).needs_logits
    with torch.no_grad():
        read = contrast(model, batch, text_positions=rule.text_positions, logits=logits)
    assert read.logp_without is not None
    relevance_N = relevance(
        rule.kind,
        read.logp_with,
        read.logp_without,
        logit_with=read.logit_with,
        logit_without=read.logit_without,
    )
    weight_N = token_weights(
        relevance_N, read.segment_ids, minimum=rule.minimum, maximum=rule.maximum, window=rule.window
    )
    columns = zip(
        _pieces(vlm.tokenizer, item.encoded),
        read.logp_with.tolist(),
        _known(read.logp_without),
        _known(relevance_N),
        weight_N.tolist(),
        read.segment_ids.tolist(),
        strict=True,
    )
    return [Token(*column) for column in columns]


def _known(values_N: Tensor) -> list[float | None]:
    return [None if math.isnan(value) else value for value in values_N.tolist()]


def _pieces(tokenizer: Any, encoded: Encoded) -> Iterator[str]:
    """What each supervised token adds to its answer's text.

    A character of several tokens is the last one's. A tokenizer's first space of a text is no part of it, so each run
    of supervised tokens is decoded by itself.
    """
    stream, before = DecodeStream(skip_special_tokens=False), False
    for token, supervised in zip(encoded.input_ids, encoded.supervised, strict=True):
        if supervised:
            if not before:
                stream = DecodeStream(skip_special_tokens=False)
            yield stream.step(tokenizer.backend_tokenizer, token) or ""
        before = supervised


def _with_truth(tokens: Sequence[Token], answers: Sequence[str], spans: Spans | None) -> Iterator[Token]:
    """Marks the tokens of a single answer; spans of several would not say of which."""
    for segment, answer in enumerate(answers):
        own = [token for token in tokens if token.segment == segment]
        flags = None
        if spans is not None and len(answers) == 1:
            flags = visual_tokens([token.text for token in own], answer, spans)
        for token, flag in zip(own, flags or [None] * len(own), strict=True):
            yield Token(
                token.text, token.logp_with, token.logp_without, token.relevance, token.weight, token.segment, flag
            )


def health_of(explanations: Sequence[Explanation]) -> Health:
    """The tokens of several explanations (of one rule) in a few numbers.

    Raises:
        UserError: there is none, or they have different rules.
    """
    rules = {explanation.rule for explanation in explanations}
    if len(rules) != 1:
        raise UserError(f"health of {len(explanations)} explanations of {len(rules)} rules: give some of one rule")
    (rule,) = rules
    tokens = [token for explanation in explanations for token in explanation.tokens]
    known = [token.relevance for token in tokens if token.relevance is not None]
    judged = [
        (token.relevance, token.visual) for token in tokens if token.relevance is not None and token.visual is not None
    ]
    weight_N = torch.tensor([token.weight for token in tokens], dtype=torch.float32)
    health = weight_health(
        weight_stats(weight_N, rule.minimum, rule.maximum, torch.ones(len(tokens), dtype=torch.bool))
    )
    return Health(
        tokens=len(tokens),
        mean_relevance=sum(known) / len(known) if known else None,
        mean_weight=health["mean_weight"],
        share_at_minimum=health["share_at_minimum"],
        share_at_maximum=health["share_at_maximum"],
        auc=roc_auc(
            torch.tensor([score for score, _ in judged], dtype=torch.float64),
            torch.tensor([visual for _, visual in judged], dtype=torch.bool),
        ),
    )
