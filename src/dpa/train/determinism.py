"""Random numbers, threads and algorithms of a stage: set on entry, put back on exit, so that a caller keeps its own."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpa.train.settings import TrainSettings

_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"


@dataclass(frozen=True, slots=True)
class RandomState:
    """The global generators of one process."""

    torch: Tensor
    """uint8, the CPU generator's."""
    accelerator: Tensor | None
    """uint8, the current CUDA device's."""
    python: tuple[Any, ...]
    """``random.getstate()``."""
    numpy: dict[str, Any]
    """``numpy.random.get_state(legacy=False)``."""


def get_random_state(device: torch.device) -> RandomState:
    """A copy of what the generators hold."""
    numpy_state = np.random.get_state(legacy=False)
    assert isinstance(numpy_state, dict)
    return RandomState(
        torch=torch.get_rng_state(),
        accelerator=torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        python=random.getstate(),
        numpy=numpy_state,
    )


def set_random_state(state: RandomState, device: torch.device) -> None:
    """Puts the generators where ``get_random_state`` found them."""
    torch.set_rng_state(state.torch)
    if state.accelerator is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state.accelerator, device)
    random.setstate(state.python)
    np.random.set_state(state.numpy)


def seed_everything(seed: int, *, stage: str, rank: int) -> None:
    """Seeds the global generators of this process; stages and ranks draw different numbers (dropout)."""
    own = int.from_bytes(blake2b(f"{seed}/{stage}/{rank}".encode(), digest_size=8).digest(), "little") >> 1
    torch.manual_seed(own)
    random.seed(own)
    np.random.seed(own % 2**32)


@contextmanager
def controlled(settings: TrainSettings, device: torch.device, *, low_precision: bool) -> Iterator[None]:
    """A stage's frame: threads, deterministic algorithms and TF32 as the settings say; everything is put back.

    Args:
        settings: ``deterministic``, ``threads``.
        device: that is trained on.
        low_precision: a bf16 run; matrix products of float32 may then use TF32 (the paper's setting).
    """
    deterministic = device.type == "cpu" if settings.deterministic is None else settings.deterministic
    random_state = get_random_state(device)
    threads = torch.get_num_threads()
    algorithms = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    products = torch.get_float32_matmul_precision()
    benchmark = torch.backends.cudnn.benchmark
    memory: Any = torch.utils.deterministic
    filling = memory.fill_uninitialized_memory
    cublas = os.environ.get(_CUBLAS)
    try:
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        if deterministic:
            os.environ.setdefault(_CUBLAS, ":4096:8")  # cuBLAS asks for it, before its first use
            torch.use_deterministic_algorithms(True)
            memory.fill_uninitialized_memory = False  # a write per allocation, for programs with bugs
            torch.backends.cudnn.benchmark = False
        if low_precision:
            torch.set_float32_matmul_precision("high")
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(algorithms, warn_only=warn_only)
        memory.fill_uninitialized_memory = filling
        torch.set_float32_matmul_precision(products)
        torch.backends.cudnn.benchmark = benchmark
        if cublas is None:
            os.environ.pop(_CUBLAS, None)
        set_random_state(random_state, device)
