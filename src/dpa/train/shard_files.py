"""Shards on disk, by torch's distributed checkpoint (DCP) in its safetensors form: a file per rank, no pickle.

Each tensor knows which part of the whole it is, so a state of any number of ranks is read by any other number, into
shards or into whole tensors. Whole tensors (a state that copies have saved) are read into shards in the same way.
(DCP is imported where it is used: it takes a while.)
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from dpa.errors import CheckpointError
from dpa.train.checkpoint import SHARDS, file_digest
from dpa.train.ranks import Ranks


def write_shards(folder: Path, tensors: Mapping[str, Tensor], ranks: Ranks) -> dict[str, str] | str:
    """Every rank writes what it has of the tensors; all ranks call it.

    Args:
        folder: on a disk that all ranks see.
        tensors: DTensors by name.

    Returns:
        File name -> sha256, of all ranks' files; or what went wrong, on any rank.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        save(dict(tensors), storage_writer=writer, process_group=ranks.group)
    except CheckpointException as error:  # on all ranks, whoever failed
        first = next(iter(error.failures.values()))
        return str(first[0] if isinstance(first, tuple) else first)
    own = sorted(folder.glob(SHARDS))[ranks.rank :: ranks.world]
    digests: dict[str, str] = {}
    for part in ranks.gather({path.name: file_digest(path) for path in own}):
        digests |= part
    return digests


def read_shards(folder: Path, tensors: Mapping[str, Tensor], ranks: Ranks) -> None:
    """Fills tensors in place, each rank with its own part of them; all ranks call it.

    Args:
        folder: of a state.
        tensors: DTensors or whole tensors by name, of the shapes that were saved.

    Raises:
        CheckpointError: a tensor is missing, or has another shape.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process: nothing to say
            load(
                dict(tensors),
                storage_reader=HuggingFaceStorageReader(str(folder)),
                process_group=ranks.group,
                no_dist=ranks.group is None,
            )
    except (CheckpointException, RuntimeError) as error:
        raise CheckpointError(
            f"{folder} cannot be read: {error}; remove it to continue from the state before"
        ) from None
