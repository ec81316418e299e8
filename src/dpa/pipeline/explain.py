"""``dpa explain`` for runs: the model of a stage as it ended, the samples of its data, drawn and not chosen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image

from dpa.analyze.explain import (
    KINDS,
    Explanation,
    Rule,
    explain,
    explain_sample,
    rule_of,
)
from dpa.analyze.truth import spans_of
from dpa.data.dataset import StageData
from dpa.data.samples import Sample
from dpa.data.shuffle import permutation
from dpa.errors import DataError, UserError
from dpa.log import get_logger
from dpa.models.vlm import Vlm
from dpa.pipeline.inputs import Inputs, settings_of, store_of
from dpa.pipeline.models import open_model, run_of
from dpa.recipe import MethodName, Recipe, StageName

log = get_logger(__name__)

_TRIED = 50
"""So many unusable samples in a row of the drawn order, and it is not chance."""


def explain_text(
    sources: Sequence[str],
    image: Path,
    text: str,
    *,
    prompt: str | None = None,
    stage: StageName = "finetune",
    kind: str = "cmo",
    proxy: Path | None = None,
    truth: Path | None = None,
) -> tuple[Explanation, ...]:
    """One text about one image under one or more models, which are in memory one after another.

    Args:
        sources: see :func:`open_model`; ``proxy`` is the first one's.
        truth: caption file whose records have ``visual_spans``, and one of them this text.

    Raises:
        UserError: see ``analyze.explain.explain`` and :func:`open_model`.
    """
    rule_of(kind)
    if not image.exists():  # before a model is loaded
        raise DataError(f"image missing: {image} does not exist")
    spans = {} if truth is None else spans_of([truth], [text])
    if truth is not None and text not in spans:
        raise DataError(f"--truth {truth}: no record with visual_spans has this caption: {text[:80]!r}")

    def under(source: str, proxy: Path | None) -> Explanation:
        vlm, name = open_model(source, stage=stage, proxy=proxy)
        return explain(vlm, image, text, prompt=prompt, kind=kind, visual_spans=spans.get(text), name=name)

    return tuple(under(source, proxy if place == 0 else None) for place, source in enumerate(sources))


def explain_samples(
    sources: Sequence[str],
    *,
    samples: int,
    stage: StageName | None = None,
    kind: str | None = None,
    proxy: Path | None = None,
    seed: int | None = None,
) -> list[tuple[Explanation, ...]]:
    """Samples of the data of a run's stage under one or more models.

    The weights are made as the stage made them: its bounds, window and position ids (``fidelity: exact``).

    Args:
        sources: the first is a run's or a method's folder, whose recipe names the data; more: see :func:`open_model`.
        samples: how many, drawn among those with an image; one that cannot be used gives way to the next.
        stage: None: pretrain, which has the captions; finetune for a run that started from a checkpoint.
        kind: None: the stage's objective; cmo where that is uniform.
        seed: of the draw; None: the recipe's.

    Returns:
        Per sample its explanations, in the order of ``sources``.

    Raises:
        UserError: no run, or none of its samples can be used; see also :func:`open_model`.
    """
    run = run_of(sources[0])
    if run is None:
        raise UserError(f"{sources[0]} is no run's folder (recipe.yaml is missing); --samples reads the data of a run")
    recipe = run.recipe
    if stage is None:
        stage = "pretrain" if recipe.model.start_from is None else "finetune"
    rule = stage_rule(recipe, run.method, stage, kind)
    if recipe.fidelity == "official":
        log.warning("the run's fidelity is official; weights are shown as fidelity exact makes them")
    data = Inputs(recipe, store_of(recipe)).stage_data(stage)
    with_image = [index for index, names in enumerate(data.images()) if names]
    if not with_image:
        raise UserError("the stage's data have no sample with an image: there is nothing to contrast")
    drawn = draw_samples(data, with_image, samples, recipe.seed if seed is None else seed)

    def under(source: str, proxy: Path | None) -> list[Explanation]:
        vlm, name = open_model(source, stage=stage, proxy=proxy)
        return [explain_drawn(vlm, name, one, rule, data) for one in drawn]

    columns = [under(source, proxy if place == 0 else None) for place, source in enumerate(sources)]
    return list(zip(*columns, strict=True))


def stage_rule(recipe: Recipe, method: MethodName, stage: StageName, kind: str | None = None) -> Rule:
    """How a stage makes weights (``fidelity: exact``).

    Args:
        kind: None: the stage's objective; cmo where that is uniform.
    """
    settings, own = settings_of(recipe, stage), recipe.objective(method, stage)
    chosen = kind or (own if own in KINDS else "cmo")
    given = chosen == own  # bounds and window are one objective's
    return rule_of(
        chosen,
        minimum=settings.minimum if given else None,
        maximum=settings.maximum if given else None,
        window=settings.window if given else None,
        text_positions=settings.text_positions,
    )


Drawn = tuple[Sample, tuple[Image.Image, ...]]
"""A sample and its pictures."""


def draw_samples(data: StageData, with_image: Sequence[int], count: int, seed: int) -> list[Drawn]:
    """The first ``count`` usable samples in an order that the seed fixes.

    Args:
        with_image: places in ``data`` of the samples to draw from.

    Raises:
        DataError: none can be used.
    """
    drawn: list[Drawn] = []
    refused: list[str] = []
    for place in permutation(len(with_image), seed=seed, stream="explain").tolist():
        if len(drawn) == count or len(refused) == _TRIED:
            break
        index = with_image[place]
        sample = data.sample(index)
        try:
            data.encode(sample)
            drawn.append((sample, tuple(data.picture(index, name) for name in sample.images)))
        except DataError as error:
            refused.append(f"sample {sample.id!r} ({sample.where}): {error}")
            log.warning("%s; the next one takes its place", refused[-1])
    if not drawn:
        raise DataError(f"none of {len(refused)} samples can be used; the first: {refused[0]}")
    return drawn


def explain_drawn(vlm: Vlm, name: str, drawn: Drawn, rule: Rule, data: StageData) -> Explanation:
    """
    Raises:
        DataError: the model cannot read the sample; names it.
    """
    sample, pictures = drawn
    try:
        return explain_sample(
            vlm,
            sample,
            pictures,
            rule,
            checkpoint=name,
            plain=data.format == "plain",
            max_length=data.max_length,
            max_pixels=data.max_image_pixels,
        )
    except DataError as error:  # another checkpoint has another tokenizer and other limits
        raise DataError(f"sample {sample.id!r} ({sample.where}) under {name}: {error}") from None


def headline(explanations: Sequence[Explanation]) -> Iterator[str]:
    """What the command line says about each: numbers, and the tokens that owe most to the image."""
    from dpa.analyze.explain_page import facts_of, parts_of, signed

    for explanation in explanations:
        yield f"{explanation.checkpoint}: {explanation.sample}"
        yield "  " + ", ".join(f"{name} {value}" for name, value in facts_of(explanation.health))
        known = [
            (token.relevance, parts_of(token.text)[1]) for token in explanation.tokens if token.relevance is not None
        ]
        most = sorted(known, key=lambda pair: -pair[0])[:6]
        yield "  most from the image: " + ", ".join(f"{text} {signed(value)}" for value, text in most)
