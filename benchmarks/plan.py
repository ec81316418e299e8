#!/usr/bin/env python3
"""Peak memory of a step as `dpa plan` counts it against what is measured here. Prints a table, or JSON with --json.

python benchmarks/plan.py
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from benchkit.accounting import peak_bytes
from benchkit.machine import describe_machine, format_table
from benchkit.shapes import SHAPES

STEP = Path(__file__).parent / "step.py"
CASES = [
    (shape, stage, checkpointing)
    for shape in ("cpu-small", "cpu-7b-ratio")
    for stage in (1, 2, 3)
    for checkpointing in (False, True)
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the result as JSON and nothing else")
    options = parser.parse_args()
    rows = [_row(*case) for case in CASES]
    if options.json:
        print(json.dumps({"machine": describe_machine(torch.device("cpu")), "rows": rows}))
        return 0
    header = ["shape", "stage", "checkpointing", "counted MiB", "measured MiB", "counted / measured"]
    body = [
        [
            row["shape"],
            str(row["stage"]),
            "yes" if row["checkpointing"] else "no",
            f"{row['counted'] / 2**20:,.0f}",
            f"{row['measured'] / 2**20:,.0f}",
            f"{row['ratio']:.2f}",
        ]
        for row in rows
    ]
    print(format_table(header, body))
    return 0


def _row(name: str, stage: int, checkpointing: bool) -> dict[str, Any]:
    """All that is alive at the peak: weights, gradients, moments and what the step needs beyond them."""
    command = [sys.executable, str(STEP), "--shape", name, "--stage", str(stage), "--json", "--rows", "ours"]
    command += ["--repeats", "1"] + (["--checkpointing"] if checkpointing else [])
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    measured = json.loads(done.stdout)["rows"][0]["peak_bytes"]
    found = peak_bytes(
        SHAPES[name], stage, "ours", checkpointing=checkpointing, number=4, on_cpu=True, accumulates=False
    )
    # Measured is what a first step needs beyond weights and batch, which are there before it; weights are known to the
    # byte. Moments are made when activations are gone, so a first step's peak is the larger of the two.
    states = peak_bytes(SHAPES[name], stage, "ours", number=4, on_cpu=True)["gradients"] + found["optimizer"]
    beyond = found["total"] - found["weights"] - found["batch"] - found["optimizer"]
    counted = found["weights"] + max(states, beyond)
    measured += found["weights"]
    ratio = counted / measured
    return {
        "shape": name,
        "stage": stage,
        "checkpointing": checkpointing,
        "counted": counted,
        "measured": measured,
        "ratio": ratio,
    }


if __name__ == "__main__":
    sys.exit(main())
