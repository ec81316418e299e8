"""The conflict score at five levels of the lab's conflict: the table of docs/conflict.md and the verdict's thresholds.

    python scripts/conflict_levels.py            # after every exchange of the lab's LLM

Captions of the same scenes in language A and, for 0, 25, 50, 75 and 100 % of them, in language B. Writes
``src/dpa/analyze/conflict/levels.json`` (which the verdict reads), and in ``docs/conflict.md`` the two tables between
their marks. Same seed, same LLM, same number of threads: same figures.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from dpa.analyze.conflict import Caption, Conflict, ConflictSettings, measure_conflict, sample_of
from dpa.analyze.conflict.text import figure
from dpa.analyze.conflict.verdict import thresholds_of
from dpa.data.shuffle import permutation
from dpa.lab.language import caption
from dpa.lab.scenes import draw_scene
from dpa.log import quiet_libraries
from dpa.models.digest import digest_of_llm
from dpa.models.parts import resolve_part
from dpa.models.settings import ModelSettings

ROOT = Path(__file__).parents[1]
LEVELS_FILE = ROOT / "src/dpa/analyze/conflict/levels.json"
DOCUMENT = ROOT / "docs/conflict.md"
PERCENT_B = (0, 25, 50, 75, 100)
_PHRASES = 8


def captions_at(percent_b: int, count: int, *, seed: int) -> list[Caption]:
    """``count`` scenes in A, so many per cent of them in B instead; the same scenes at every level."""
    order = permutation(count, seed=seed, stream="levels")
    in_b = set(order[: round(count * percent_b / 100)].tolist())
    rng = {language: random.Random(f"levels:{seed}:{language}") for language in ("a", "b")}
    found = []
    for index in range(count):
        scene = draw_scene(seed, index)
        said = {language: caption(scene, language, rng[language]) for language in ("a", "b")}
        chosen = said["b" if index in in_b else "a"]
        found.append(Caption(f"scene-{index}", chosen.text, visual_spans=chosen.visual_spans))
    return found


def row_of(percent_b: int, conflict: Conflict) -> dict[str, Any]:
    """What is kept of a level."""
    named = ("prior_held_out", "proxy_held_out", "gap", "gap_adapted", "gap_per_caption", "share")
    row: dict[str, Any] = {"percent_b": percent_b, "tokens": conflict.tokens}
    row |= {name: asdict(getattr(conflict, name)) for name in named}
    return row | {item.name: asdict(item.gap) for item in conflict.truth}


def levels_table(levels: list[tuple[int, Conflict]]) -> str:
    """Markdown."""
    lines = [
        "| captions in B | surprise, LLM | surprise, proxy | **score**, nats per token | nats per caption | share of "
        "the surprise | score on captions read | gap, visual words | gap, linguistic words |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for percent, found in levels:
        assert found.gap_adapted is not None
        truth = {item.name: " ".join(figure(item.gap)) for item in found.truth}
        cells = [
            f"{percent} %",
            figure(found.prior_held_out)[0],
            figure(found.proxy_held_out)[0],
            "**{}** {}".format(*figure(found.gap)),
            " ".join(figure(found.gap_per_caption)),
            " ".join(figure(found.share, "of the surprise")),
            figure(found.gap_adapted)[0],
            truth["visual"],
            truth["linguistic"],
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def phrases_table(found: Conflict) -> str:
    """Markdown."""
    lines = ["| phrase | captions | gap, nats | surprise, nats | example |", "|---|---|---|---|---|"]
    for item in found.phrases[:_PHRASES]:
        lines.append(f"| {item.text} | {item.captions} | {item.gap:.2f} | {item.prior:.2f} | {item.example} |")
    return "\n".join(lines)


def put(text: str, mark: str, content: str) -> str:
    """Replaces what stands between ``<!-- mark -->`` and ``<!-- end -->``."""
    pattern = re.compile(rf"(<!-- {mark} -->\n).*?(\n<!-- end -->)", re.DOTALL)
    assert pattern.search(text), f"{DOCUMENT} has no mark {mark}"
    return pattern.sub(lambda match: match[1] + content + match[2], text)


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llm", default="lab:llm")
    parser.add_argument("--scenes", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dry-run", action="store_true", help="print, write nothing")
    given = parser.parse_args()
    quiet_libraries()
    began = time.perf_counter()
    levels = []
    for percent in PERCENT_B:
        sample = sample_of(captions_at(percent, given.scenes, seed=given.seed), f"lab, {percent} % B")
        found = measure_conflict(sample, ModelSettings(llm=given.llm), ConflictSettings(seed=given.seed), device="cpu")
        print(f"{percent:3d} % B: {found.gap}, {found.seconds:.0f} s", flush=True)
        levels.append((percent, found))
    minutes = (time.perf_counter() - began) / 60
    made = levels[0][1].adaptation
    assert made is not None
    steps = f"{made.steps} steps of 16 captions, rank {made.rank}, learning rate {made.learning_rate:g}"
    machine = f"{os.cpu_count()} CPU cores ({platform.machine()}), {torch.get_num_threads()} thread(s)"
    note = (
        f"`python scripts/conflict_levels.py`: {given.scenes:,} scenes, half of them held out, {steps}, seed "
        f"{given.seed}, {machine}, {minutes:.0f} minutes."
    )
    table, phrases = levels_table(levels), phrases_table(levels[-1][1])
    print(table, phrases, note, sep="\n\n")
    if given.dry_run:
        return
    rows = [row_of(percent, found) for percent, found in levels]
    content = {
        "command": f"python scripts/conflict_levels.py --scenes {given.scenes} --seed {given.seed}",
        "llm": given.llm,
        "steps": made.steps,
        "llm_digest": digest_of_llm(Path(resolve_part(given.llm)), cast=torch.float32),
        "machine": machine,
        "versions": levels[0][1].versions,
        "levels": rows,
    }
    LEVELS_FILE.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    limits = thresholds_of(rows)
    text = DOCUMENT.read_text(encoding="utf-8")
    text = put(text, "levels", f"{table}\n\n{note}")
    text = put(text, "phrases", phrases)
    middles = "the middle between 0 and 25 %", "the middle between 25 and 100 %"
    said = f"medium from {limits.medium:.1%} ({middles[0]}), high from {limits.high:.1%} ({middles[1]})"
    text = put(text, "thresholds", said)
    DOCUMENT.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
