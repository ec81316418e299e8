"""torch.compile for the decoder's layers, in place and for a while: names of weights and saved states stay.

Each layer is compiled by itself: all layers share one program, which compiles in seconds where a whole model takes
minutes, and what lies between them (splice, head, weights) stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def compiled(model: nn.Module) -> Iterator[None]:
    """While open, the decoder's layers run compiled; afterwards they are as before.

    Programs are for any batch size and length (``dynamic``), so that a batch of another shape compiles nothing anew.
    Hooks that are set on modules inside a layer while this is open are not called: torch.compile does not look for
    them. (``contrast`` with ``fidelity="official"`` needs such hooks; a recipe with both is refused.)

    Args:
        model: a LLaVA, or an LLM with or without an adapter.
    """
    whole: Any = model
    layers: list[nn.Module] = list(whole.get_decoder().layers)
    for layer in layers:
        layer.compile(dynamic=True)
    try:
        yield
    finally:
        for layer in layers:
            _put(layer, None)


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """While open, nothing in ``model`` runs compiled, so that hooks are called."""
    before = {module: module._compiled_call_impl for module in model.modules() if module._compiled_call_impl}
    for module in before:
        _put(module, None)
    try:
        yield
    finally:
        for module, call in before.items():
            _put(module, call)


def _put(module: nn.Module, call: Any) -> None:
    # torch's own attribute: Module.compile() has no counterpart that takes it back
    module._compiled_call_impl = call
