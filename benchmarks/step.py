#!/usr/bin/env python3
"""One training step: plain training, the reference's CMO, ours. Prints a table, or JSON with --json.

python benchmarks/step.py --shape cpu-small --stage 2
python benchmarks/step.py --shape cpu-small --stage 2 --rows vanilla ours ours-cached
python benchmarks/step.py --shape qwen2.5-7b --stage 2 --json       # needs a CUDA device
python benchmarks/step.py --shape qwen2.5-7b --stage 2 --project    # FLOPs and bytes from shapes alone
"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from benchkit.accounting import projection
from benchkit.clock import TEXT_ONLY_PASS
from benchkit.machine import describe_machine, format_table
from benchkit.measure import (
    PEAK_METHODS,
    child_main,
    measure_times,
    measured_peak_flops,
    peak_here,
    peak_in_child,
)
from benchkit.shapes import SHAPES, Shape
from benchkit.variants import DEFAULT_ROWS, VARIANTS, Case, loss_with_official_fidelity, make_case

from dpa.train.compiled import compiled


def main(arguments: list[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(given)
    shape = SHAPES[options.shape].varied(
        stage=options.stage, micro_batch=options.micro_batch, caption=options.caption_tokens
    )
    if options.project:
        _print(projection(shape, options.stage), as_json=options.json)
        return 0
    if "ours-cached" in options.rows and options.stage != 2:
        print("row ours-cached is stage 2's: in stage 1 no image is read, in stage 3 the LLM moves", file=sys.stderr)
        return 2
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if shape.on_gpu and device.type != "cuda":
        print(f"{shape.name} needs a CUDA device; --project prints its FLOPs and bytes from shapes", file=sys.stderr)
        return 2
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if options.memory_of is not None:
        child_main(lambda: _case(shape, options, device), lambda: _tiny(options, device), options.memory_of)
        return 0
    result = run(shape, options, device, [argument for argument in given if argument not in ("--json", "--compile")])
    _print(result, as_json=options.json)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), required=True)
    parser.add_argument("--stage", type=int, choices=[1, 2, 3], default=2)
    parser.add_argument("--json", action="store_true", help="print the result as JSON and nothing else")
    parser.add_argument("--project", action="store_true", help="no run: FLOPs and bytes counted from shapes")
    parser.add_argument("--rows", nargs="+", choices=list(VARIANTS), default=list(DEFAULT_ROWS))
    parser.add_argument("--repeats", type=int, default=21, help="timed turns; the minimum is reported")
    parser.add_argument("--budget", type=float, default=120.0, help="seconds after which no further turn begins")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's own choice")
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto", help="auto: bf16 on CUDA")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing, in all rows")
    parser.add_argument("--compile", action="store_true", help="torch.compile for the LLM's layers, in all rows' times")
    parser.add_argument("--micro-batch", type=int, help="samples; default: the shape's")
    parser.add_argument("--caption-tokens", type=int, help="tokens of a caption (stages 1 and 2); default: the shape's")
    parser.add_argument("--memory-of", choices=list(VARIANTS), help=argparse.SUPPRESS)
    return parser


def _case(shape: Shape, options: argparse.Namespace, device: torch.device) -> Case:
    precision = options.precision
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" else "fp32"
    return make_case(shape, options.stage, device=device, precision=precision, checkpointing=options.checkpointing)


def _tiny(options: argparse.Namespace, device: torch.device) -> Case:
    return _case(SHAPES["tiny"], options, device)


def run(shape: Shape, options: argparse.Namespace, device: torch.device, child_arguments: list[str]) -> dict[str, Any]:
    """Measures all rows; see ``benchkit.measure`` for how."""
    names: list[str] = options.rows
    on_cpu = device.type == "cpu"
    memory = {name: peak_in_child(Path(__file__), child_arguments, name) for name in names} if on_cpu else {}
    case = _case(shape, options, device)
    peak_flops = measured_peak_flops(device, case.autocast or torch.float32)
    official_fidelity = loss_with_official_fidelity(case) if "official" in names else None
    with compiled(case.model) if options.compile else nullcontext():
        times = measure_times(case, names, repeats=options.repeats, budget=options.budget)
    if not on_cpu:
        memory = {name: peak_here(case, name) for name in names}
    useful_flops = projection(shape, options.stage)["flops"]["vanilla"]["total"]
    rows = [
        {
            "name": name,
            "seconds": min(found.seconds),
            "cpu_seconds": min(found.cpu_seconds),
            **memory[name],
            "tokens_per_s": case.sequence_tokens / min(found.seconds),
            "mfu": useful_flops / min(found.seconds) / peak_flops,
            "loss": found.loss,
            "parts": found.parts,
        }
        for name, found in times.items()
    ]
    return {
        "shape": shape.name,
        "stage": options.stage,
        "micro_batch": shape.micro_batch[options.stage - 1],
        "tokens_per_sample": {
            "sequence": shape.length(options.stage),
            "text": shape.text_tokens(options.stage),
            "supervised": shape.supervised_tokens(options.stage),
        },
        "precision": case.precision,
        "checkpointing": case.checkpointing,
        "compile": options.compile,
        "repeats": min(len(found.seconds) for found in times.values()),
        "machine": describe_machine(device),
        "matrix_product_flops": peak_flops,
        "peak_method": PEAK_METHODS[device.type],
        "rows": rows,
        "ratios": _ratios(rows),
        "loss_ours_with_official_fidelity": official_fidelity,
        "official_loss_difference": None
        if official_fidelity is None
        else abs(times["official"].loss - official_fidelity),
    }


def _ratios(rows: list[dict[str, Any]]) -> dict[str, float]:
    """What the project promises (docs/performance.md), as far as the rows are there."""
    by_name = {row["name"]: row for row in rows}
    ratios = {
        f"{above}_over_{below}_{figure}": by_name[above][figure] / by_name[below][figure]
        for above, below in (("ours", "vanilla"), ("ours-cached", "vanilla"), ("official", "ours"))
        for figure in ("cpu_seconds", "seconds", "peak_bytes")
        if above in by_name and below in by_name
    }
    if "ours" in by_name:
        ratios["text_only_pass_share"] = by_name["ours"]["parts"].get(TEXT_ONLY_PASS, 0.0)
    return ratios


_TABLE = (
    ("row", lambda row: row["name"]),
    ("seconds", lambda row: f"{row['seconds']:.3f}"),
    ("CPU s", lambda row: f"{row['cpu_seconds']:.3f}"),
    ("tokens/s", lambda row: f"{row['tokens_per_s']:,.0f}"),
    ("MFU %", lambda row: f"{100 * row['mfu']:.0f}"),
    ("peak MiB", lambda row: f"{row['peak_bytes'] / 2**20:,.0f}"),
    ("loss", lambda row: f"{row['loss']:.6f}"),
)
_PARTS = ("tower_connector", "pass", "head", "text_only_pass", "backward", "optimizer", "other")


def _print(result: dict[str, Any], *, as_json: bool) -> None:
    if as_json or "rows" not in result:
        print(json.dumps(result, indent=None if as_json else 2))
        return
    rows, machine = result["rows"], result["machine"]
    tokens = result["tokens_per_sample"]
    print(
        f"{result['shape']}, stage {result['stage']}, {result['precision']}, {result['micro_batch']} samples of "
        f"{tokens['sequence']} tokens ({tokens['supervised']} supervised); {machine['device']}, "
        f"{machine['threads']} threads; minimum of {result['repeats']}\n"
    )
    header = [title for title, _ in _TABLE] + [f"{part} %" for part in _PARTS]
    body = [
        [show(row) for _, show in _TABLE] + [f"{100 * row['parts'].get(part, 0):.1f}" for part in _PARTS]
        for row in rows
    ]
    print(format_table(header, body))
    print()
    for name, value in result["ratios"].items():
        print(f"{name:<40}{value:.3f}")
    if result["official_loss_difference"] is not None:
        print(f"{'official_loss_difference':<40}{result['official_loss_difference']:.1e}")


if __name__ == "__main__":
    sys.exit(main())
