"""How well weights find the visual words: ``python scripts/weights_truth.py RUN [--method M]`` (docs/evidence.md).

Reads the model that stage 2 of a lab run has trained (the proxy with its connector where there is one), says held-out
scenes in the captions' language, and prints for candidate relevances the ROC-AUC against the truth and the share of all
weight that lies on visual words, with weights smoothed over three tokens and not. Uniform weights give visual words
their share of the tokens.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from dpa.analyze.runs import read_run
from dpa.lab.probe import Words, make_probe_set, read_words
from dpa.models.settings import ModelSettings
from dpa.models.vlm import build_vlm
from dpa.objectives import roc_auc, token_weights


def candidates(words: Words) -> dict[str, tuple[Tensor, float, float]]:
    """Name -> relevance [N], bounds of the weight."""
    logp_with, logp_without = words.logp_with, words.logp_without
    with_image, without = logp_with.exp(), logp_without.exp()
    gain = (logp_with - logp_without).clamp(min=0)
    return {
        "cmo: p_w - p_o": (with_image - without, 0.05, 0.5),
        "cal: logit_w - logit_o": (words.logit_with - words.logit_without, 1.0, 5.0),
        "prior: 1 - p_o": (1 - without, 0.0, 1.0),
        "log-ratio: log p_w - log p_o": (gain, 0.05, 1.0),
        "surprise x gain: (1 - p_o)(log p_w - log p_o)": ((1 - without) * gain, 0.05, 1.0),
        "normalised gain: (p_w - p_o) / (1 - p_o)": ((with_image - without) / (1 - without + 1e-3), 0.05, 1.0),
        "(1 - p_o) p_w": ((1 - without) * with_image, 0.05, 1.0),
    }


def main() -> None:
    """Prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--method", help="default: the run's main one")
    parser.add_argument("--language", choices=("a", "b"), default="b")
    parser.add_argument("--scenes", type=int, default=128)
    options = parser.parse_args()
    run = read_run(options.run)
    folder = run.folder_of(options.method or run.methods[0])
    proxy = folder / "proxy"
    vlm = build_vlm(
        ModelSettings.model_validate(run.recipe()["model"]),
        connector=folder / "connector" / "mm_projector.bin",
        adapter=proxy if proxy.exists() else None,
        image_mode="crop",
    )
    said = make_probe_set(vlm, scenes=options.scenes).said[options.language]
    words = read_words(vlm.model, said)
    known, truth = ~words.logp_without.isnan(), said.visual
    print(f"visual words: {100 * float(truth[known].float().mean()):.1f} % of the tokens\n")
    print("| relevance | AUC | AUC, smoothed weights | share of weight on visual words, % | not smoothed |")
    print("|---|---|---|---|---|")
    for name, (relevance, low, high) in candidates(words).items():
        smooth, sharp = (
            token_weights(relevance, words.segment_ids, minimum=low, maximum=high, window=window) for window in (3, 1)
        )
        shares = [100 * float(w[known & truth].sum() / w[known].sum()) for w in (smooth, sharp)]
        found = [roc_auc(value[known], truth[known]) for value in (relevance, smooth)]
        print(f"| {name} | {found[0]:.2f} | {found[1]:.2f} | {shares[0]:.1f} | {shares[1]:.1f} |")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
