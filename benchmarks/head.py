#!/usr/bin/env python3
"""The head alone: hidden states -> log-probability of each label, and the gradient. A table, or JSON with --json.

    python benchmarks/head.py                                        # a small head on the CPU
    python benchmarks/head.py --dtype bf16 --tokens 600 --hidden 896
    python benchmarks/head.py --tokens 8192 --hidden 3584 --vocabulary 152064 --dtype bf16      # Qwen2.5-7B, on CUDA

Rows: ours (dpa.label_logprobs), materialised logits, torch's own F.linear_cross_entropy (chunked where this torch has
it), Liger-Kernel's fused op (CUDA, where installed). Time and peak memory of forward and backward; the error of value
and gradient against float64 on the same inputs.

Legend: N tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from benchkit.clock import now
from benchkit.machine import describe_machine, format_table
from torch import Tensor
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile

import dpa

Head = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(hidden [N, H], weight [V, H], labels [N]) -> log-probabilities [N]."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def ours(hidden_NH: Tensor, weight_VH: Tensor, labels_N: Tensor) -> Tensor:
    return dpa.label_logprobs(hidden_NH, weight_VH, labels_N)


def materialised(hidden_NH: Tensor, weight_VH: Tensor, labels_N: Tensor) -> Tensor:
    return -functional.cross_entropy((hidden_NH @ weight_VH.t()).float(), labels_N, reduction="none")


def torch_chunked(hidden_NH: Tensor, weight_VH: Tensor, labels_N: Tensor) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    return -functional.linear_cross_entropy(hidden_NH, weight_VH, labels_N, reduction="none", options=options)


def torch_plain(hidden_NH: Tensor, weight_VH: Tensor, labels_N: Tensor) -> Tensor:
    return -functional.linear_cross_entropy(hidden_NH, weight_VH, labels_N, reduction="none")


def liger(hidden_NH: Tensor, weight_VH: Tensor, labels_N: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    loss_N: Tensor = liger_fused_linear_cross_entropy(
        hidden_NH, weight_VH, labels_N, reduction="none", accum_dtype=torch.float32
    )
    return -loss_N


def heads(device: torch.device) -> dict[str, Head]:
    """The rows that this machine has."""
    found: dict[str, Head] = {"ours": ours, "materialised": materialised}
    if hasattr(functional, "linear_cross_entropy"):
        found["torch linear_cross_entropy"] = torch_plain
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        found["torch linear_cross_entropy, chunked"] = torch_chunked
    if device.type == "cuda" and importlib.util.find_spec("liger_kernel") is not None:
        found["liger"] = liger
    return found


def step(head: Head, hidden_NH: Tensor, weight_VH: Tensor, labels_N: Tensor, grad_N: Tensor) -> tuple[Tensor, Tensor]:
    """(log-probabilities [N], gradient of ``hidden`` [N, H]) with token weights ``grad``."""
    logp_N = head(hidden_NH, weight_VH, labels_N)
    (logp_N * grad_N).sum().backward()
    gradient_NH = hidden_NH.grad
    assert gradient_NH is not None
    hidden_NH.grad = weight_VH.grad = None
    return logp_N.detach(), gradient_NH


def exact(hidden_NH: Tensor, weight_VH: Tensor, labels_N: Tensor, grad_N: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """The same in float64, a slice of tokens at a time."""
    weight_VH = weight_VH.detach().double()
    values, gradients = [], []
    for start in range(0, len(labels_N), rows):
        part = slice(start, start + rows)
        hidden = hidden_NH[part].detach().double().requires_grad_()
        logp = -functional.cross_entropy(hidden @ weight_VH.t(), labels_N[part], reduction="none")
        (logp * grad_N[part].double()).sum().backward()
        assert hidden.grad is not None
        values.append(logp.detach())
        gradients.append(hidden.grad)
    return torch.cat(values), torch.cat(gradients)


def peak(work: Callable[[], Any], device: torch.device) -> int:
    """Bytes of tensors alive at once beyond what was there before."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    alive = highest = 0
    for event in recorded.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            alive += event.nbytes()
            highest = max(highest, alive)
    return highest


def run(options: argparse.Namespace) -> dict[str, Any]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype, generator = DTYPES[options.dtype], torch.Generator().manual_seed(0)
    hidden_NH = torch.randn(options.tokens, options.hidden, generator=generator).to(device, dtype).requires_grad_()
    weight_VH = torch.randn(options.vocabulary, options.hidden, generator=generator) / options.hidden**0.5
    weight_VH = weight_VH.to(device, dtype).requires_grad_(options.trained_head)
    labels_N = torch.randint(options.vocabulary, (options.tokens,), generator=generator).to(device)
    grad_N = torch.linspace(0.05, 0.5, options.tokens, device=device)
    true_value, true_gradient = exact(hidden_NH, weight_VH, labels_N, grad_N, rows=256)
    found = heads(device)
    best = {name: [float("inf"), float("inf")] for name in found}
    rows: dict[str, dict[str, Any]] = {}
    for name, head in found.items():  # warms up, too
        value, gradient = step(head, hidden_NH, weight_VH, labels_N, grad_N)
        rows[name] = {
            "name": name,
            "error_logp": float((value.double() - true_value).abs().max()),
            "error_gradient": float((gradient.double() - true_gradient).abs().max() / true_gradient.abs().max()),
        }
    for _ in range(options.repeats):
        for name, head in found.items():
            before = now(device)
            step(head, hidden_NH, weight_VH, labels_N, grad_N)
            after = now(device)
            best[name] = [min(best[name][k], after[k] - before[k]) for k in range(2)]
    for name, head in found.items():
        rows[name] |= {"seconds": best[name][0], "cpu_seconds": best[name][1]}
        rows[name]["peak_bytes"] = peak(lambda head=head: step(head, hidden_NH, weight_VH, labels_N, grad_N), device)
    return {
        **{name: getattr(options, name) for name in ("tokens", "hidden", "vocabulary", "dtype", "trained_head")},
        "floor_seconds": _products(hidden_NH.detach(), weight_VH.detach(), device, options),
        "peak_method": "max_memory_allocated" if device.type == "cuda" else "torch.profiler, tensors alive at once",
        "machine": describe_machine(device),
        "rows": list(rows.values()),
    }


def _products(hidden_NH: Tensor, weight_VH: Tensor, device: torch.device, options: argparse.Namespace) -> float:
    """CPU time (CUDA: wall-clock) of the matrix products alone, the least that any row can cost."""
    clock, count, best = int(device.type == "cpu"), 4 if options.trained_head else 2, float("inf")
    for _ in range(options.repeats + 1):
        before = now(device)
        torch.mm(hidden_NH, weight_VH.t())
        best = min(best, now(device)[clock] - before[clock])
    return count * best


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=120, help="supervised tokens of a micro-batch")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32")
    parser.add_argument("--trained-head", action="store_true", help="stage 3: also the gradient of the weight")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's own choice")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    result = run(options)
    if options.json:
        print(json.dumps(result))
        return 0
    print(
        f"{options.tokens} tokens, hidden {options.hidden}, vocabulary {options.vocabulary}, {options.dtype}, "
        f"{result['machine']['device']}, {result['machine']['threads']} threads; matrix products alone "
        f"{1e3 * result['floor_seconds']:.1f} ms\n"
    )
    header = ["row", "ms", "CPU ms", "peak MiB", "error of log p", "of the gradient (relative)"]
    body = [
        [
            row["name"],
            f"{1e3 * row['seconds']:.1f}",
            f"{1e3 * row['cpu_seconds']:.1f}",
            f"{row['peak_bytes'] / 2**20:.1f}",
            f"{row['error_logp']:.1e}",
            f"{row['error_gradient']:.1e}",
        ]
        for row in result["rows"]
    ]
    print(format_table(header, body))
    return 0


if __name__ == "__main__":
    sys.exit(main())
