"""Largest difference between our forwards and transformers' own, for every family; on tiny random checkpoints.

    python benchmarks/families.py [--json] [--out FILE] [--dtype float32] [--dtype float64]

Each family has its real architecture code: grouped-query attention, tied embeddings, norms of queries and keys,
soft-caps that bend, and where there may be a sliding window a second row with one of 5 tokens, shorter than the
samples. Columns (``dpa.testing.agreement``): *text* our logits for text, padded, against ``AutoModelForCausalLM`` on
each sample alone; *packed* the same with several samples in a row; *text-only* log-probs of labels with the images left
out, against the LLM on the text alone; *image* logits against ``LlavaForConditionalGeneration``; *loss* against the
loss that it returns (which it computes in float32). Norms compute in float32, so that in float64 differences vanish in
them; Gemma-2's eager attention takes its softmax in float32, too, where they do not.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers

from dpa.testing.agreement import CASES, Agreement, measure

DTYPES = {"float32": torch.float32, "float64": torch.float64}


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dtype", action="append", choices=sorted(DTYPES), help="default: both")
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    return parser.parse_args(argv)


def document(rows: list[Agreement]) -> dict[str, Any]:
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    return {
        "benchmark": "families",
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, CPU, one thread",
        "versions": {**versions, "transformers": transformers.__version__},
        "rows": [asdict(row) for row in rows],
    }


def table(rows: list[Agreement]) -> str:
    lines = [
        "| family | model_type | window | dtype | attention | text | packed | text-only | image | loss |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        numbers = (row.logits, row.packed, row.text_only, row.image, row.loss)
        facts = (row.family, row.model_type, row.window or "-", row.dtype, row.attention)
        lines.append("| " + " | ".join([*map(str, facts), *(f"{value:.1e}" for value in numbers)]) + " |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments(argv)
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    rows = []
    for dtype in options.dtype or DTYPES:
        for family, window in CASES:
            with tempfile.TemporaryDirectory() as folder:
                rows.append(measure(Path(folder), family, window=window, dtype=DTYPES[dtype]))
    result = document(rows)
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result) if options.json else table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
