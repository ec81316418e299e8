"""Random order without state: the same key gives the same order, on any machine, in any process, at any time."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]


def permutation(size: int, *, seed: int, stream: str) -> Indices:
    """A permutation of ``range(size)`` that depends on its arguments alone.

    Sorts raw words of Philox (Salmon et al. 2011), whose stream numpy guarantees; ``Generator.permutation`` may change
    between numpy's versions, and a resumed run would read other data.

    Args:
        size: number of items.
        seed: the run's.
        stream: what the order is for (``"epoch 3"``); other streams of one seed are independent.
    """
    key = int.from_bytes(hashlib.blake2b(f"{seed}/{stream}".encode(), digest_size=16).digest(), "little")
    words = np.random.Philox(key=key).random_raw(size)
    return np.argsort(words, kind="stable").astype(np.int64)
