"""What ``dpa data check`` says in a terminal."""

from __future__ import annotations

import io
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dpa.data.check import HUGE_PIXELS, ImagesCheck, Spread, StageCheck

_BLOCKS = " ▁▂▃▄▅▆▇█"
_WIDTH = 120


def check_text(stages: Sequence[StageCheck], llm: str) -> str:
    """All stages, and the verdict."""
    parts = [_stage(stage, llm) for stage in stages]
    refused = [stage for stage in stages if stage.refusal is not None]
    verdict = "Training can start on these data."
    if refused:
        verdict = "\n".join(f"Training would not start ({stage.stage}): {stage.refusal}" for stage in refused)
    return "\n\n".join([*parts, verdict])


def number(value: float) -> str:
    """With thousands."""
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.1f}"


def _stage(stage: StageCheck, llm: str) -> str:
    table = Table(box=None, pad_edge=False, show_header=False, title=None)
    table.add_column()
    table.add_column(overflow="fold")
    for name, value in rows_of(stage, llm):
        table.add_row(name, Text(value))
    for name, spread in spreads_of(stage):
        table.add_row(name, Text(_spread(spread)))
    table.add_row("left out", Text(f"{number(stage.samples - stage.usable)} samples"))
    for problem in stage.problems:
        table.add_row(f"  {problem.kind}", Text(number(problem.samples)))
        for example in problem.examples[:2]:
            table.add_row("", Text(f"{example['id']} ({example['where']}): {example['reason']}"))
    return f"{stage.stage}: {stage.format}, max_length {stage.max_length}\n{_plain(table)}"


def rows_of(stage: StageCheck, llm: str) -> list[tuple[str, str]]:
    """Name and value of a stage's figures."""
    rows = [(f"source ({source.kind})", _source(source.path, source.files)) for source in stage.sources]
    rows += [("", note) for source in stage.sources for note in source.notes]
    rows += [
        (
            "samples",
            f"{number(stage.samples)}: {number(stage.with_image)} with image"
            f" ({number(stage.several_images)} with several), {number(stage.text_only)} text alone",
        ),
        ("tokenizer", llm),
        ("tokens", f"{number(stage.all_tokens)}, supervised {number(stage.supervised_tokens)}"),
        ("cut at max_length", f"{number(stage.cut_samples)} samples lose {number(stage.cut_tokens)} tokens"),
    ]
    return rows if stage.images is None else rows + _images(stage.images)


def spreads_of(stage: StageCheck) -> list[tuple[str, Spread]]:
    """Name and histogram."""
    images = stage.images
    found = [("tokens a sample", stage.tokens), ("supervised tokens a sample", stage.supervised)]
    if images is not None:
        found += [("image width", images.width), ("image height", images.height)]
    return [(name, spread) for name, spread in found if spread is not None]


def _source(path: str, files: int) -> str:
    return path if files == 1 else f"{path} ({files} files)"


def _images(images: ImagesCheck) -> list[tuple[str, str]]:
    how = {"none": "", "header": ", headers read", "decoded": ", decoded"}[images.check]
    rows = [("images", f"{number(images.references)}, {number(images.different)} different{how}")]
    rows += [(f"  {kind}", number(count)) for kind, count in images.problems.items()]
    rows.append(
        ("  duplicate", f"{number(images.duplicates)}{_examples([' = '.join(g) for g in images.duplicate_examples])}")
    )
    rows.append((f"  huge (> {HUGE_PIXELS // 10**6} MP)", f"{number(images.huge)}{_examples(images.huge_examples)}"))
    return rows


def _examples(names: Sequence[str]) -> str:
    return f"  e.g. {names[0][:80]}" if names else ""


def _spread(spread: Spread) -> str:
    if spread.least == spread.most:
        return f"always {number(spread.least)}"
    top = max(spread.counts)
    bars = "".join(_BLOCKS[-(-count * (len(_BLOCKS) - 1) // top)] for count in spread.counts)
    return (
        f"{number(spread.least)} |{bars}| {number(spread.most)}   median {number(spread.median)}, mean "
        f"{number(spread.mean)}, 95 % {number(spread.p95)}"
    )


def _plain(table: Table) -> str:
    console = Console(file=io.StringIO(), width=_WIDTH, color_system=None)
    with console.capture() as captured:
        console.print(table)
    return "\n".join(line.rstrip() for line in captured.get().rstrip().split("\n"))
