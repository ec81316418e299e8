"""dpa: Decoupled Proxy Alignment. The names below are stable and imported on first use, so ``import dpa`` is light."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dpa.analyze.explain import Explanation, explain
    from dpa.models.contrast import Contrast, contrast
    from dpa.objectives import label_logprobs, relevance, token_weights, weighted_nll
    from dpa.pipeline import RunResult, run
    from dpa.recipe import Recipe, load_recipe

_HOMES = {
    "Contrast": "dpa.models.contrast",
    "Explanation": "dpa.analyze.explain",
    "Recipe": "dpa.recipe",
    "RunResult": "dpa.pipeline",
    "contrast": "dpa.models.contrast",
    "explain": "dpa.analyze.explain",
    "label_logprobs": "dpa.objectives",
    "load_recipe": "dpa.recipe",
    "relevance": "dpa.objectives",
    "run": "dpa.pipeline",
    "token_weights": "dpa.objectives",
    "weighted_nll": "dpa.objectives",
}

__all__ = [
    "Contrast",
    "Explanation",
    "Recipe",
    "RunResult",
    "contrast",
    "explain",
    "label_logprobs",
    "load_recipe",
    "relevance",
    "run",
    "token_weights",
    "weighted_nll",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'dpa' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
