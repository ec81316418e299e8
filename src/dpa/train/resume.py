"""A stage's position in its training: taken apart into a saved state, and put together again.

Saved: trained parameters, optimizer moments, schedule, every rank's generators, and where metrics.jsonl stood. The data
needs nothing: its order is a function of the step's number.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Parameter
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from dpa.errors import DpaError
from dpa.log import get_logger
from dpa.train.checkpoint import SavedState, StateStore
from dpa.train.determinism import RandomState, get_random_state
from dpa.train.metrics import START, MetricsFile, Position
from dpa.train.parallel import Parallel
from dpa.train.ranks import raise_everywhere
from dpa.train.shard_files import read_shards, write_shards

log = get_logger(__name__)

_TRAINED, _OPTIMIZER, _RANDOM = "trained.", "optimizer.", "random."
_MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's, of a parameter's shape; its count of steps stands beside them."""


@dataclass(frozen=True, slots=True)
class Training:
    """What moves while a stage trains."""

    trained: Mapping[str, Parameter]
    """In the optimizer's order."""
    optimizer: AdamW
    schedule: LambdaLR


@dataclass(frozen=True, slots=True)
class Restored:
    """Where a start begins."""

    step: int
    """Optimizer steps done; 0: from the beginning."""
    random: RandomState | None
    """This rank's generators; None: seed them."""


def save(parallel: Parallel, store: StateStore, step: int, training: Training, metrics: MetricsFile | None) -> None:
    """Saves a state after ``step`` optimizer steps; all ranks call it.

    Rank 0 (which has ``metrics``) writes, each rank its own shards where there are any.
    """
    ranks = parallel.ranks
    random = ranks.gather(get_random_state(parallel.device))
    tensors, values = _apart(training, random)
    shards = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, DTensor)}
    if metrics is not None:
        position = _position(metrics, step)
        folder = None if position is None else store.begin(step)
        values["metrics"] = None if position is None else asdict(position)
    else:
        folder = None
    folder = ranks.from_main(folder)
    if folder is None:
        return
    written = write_shards(folder, shards, ranks) if shards else {}
    if parallel.is_main:
        if isinstance(written, str):
            store.give_up(step, written)
        else:
            whole = {name: tensor for name, tensor in tensors.items() if name not in shards}
            store.finish(step, whole, values, written)
    ranks.barrier()


def _position(metrics: MetricsFile, step: int) -> Position | None:
    try:
        return metrics.position()
    except OSError as error:
        log.warning("step %d: no state is saved while metrics cannot be written (%s)", step, error.strerror)
        return None


def restore(parallel: Parallel, store: StateStore, training: Training, metrics: MetricsFile | None) -> Restored:
    """Puts ``training`` where the newest good state had it and cuts the metrics there; all ranks call it.

    Raises:
        CheckpointError: the states are another job's.
    """
    outcome: int | DpaError | None = None
    state: SavedState | None = None
    if metrics is not None:
        try:
            state = store.load(usable=lambda found: metrics.holds(Position(**found.values["metrics"])))
        except DpaError as error:
            outcome = error  # handed on, so that no rank waits for one that has stopped
        else:
            metrics.cut(START if state is None else Position(**state.values["metrics"]))
            outcome = None if state is None else state.step
    outcome = parallel.ranks.from_main(outcome)
    if isinstance(outcome, DpaError):
        raise_everywhere(outcome)
    if outcome is None:
        return Restored(step=0, random=None)
    if state is None:
        state = store.read(outcome)
    return Restored(step=state.step, random=_together(training, state, parallel))


def _apart(training: Training, random: list[RandomState]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors: dict[str, Tensor] = {}
    for name, parameter in training.trained.items():
        tensors[_TRAINED + name] = parameter
        for field, value in training.optimizer.state[parameter].items():
            tensors[f"{_OPTIMIZER}{field}.{name}"] = value
    ranks = []
    for rank, state in enumerate(random):
        tensors[f"{_RANDOM}{rank}.torch"] = state.torch
        if state.accelerator is not None:
            tensors[f"{_RANDOM}{rank}.accelerator"] = state.accelerator
        ranks.append({"python": state.python, "numpy": _plain(state.numpy)})
    return tensors, {
        "schedule": training.schedule.state_dict(),
        "random": ranks,
        "moments": any(training.optimizer.state.values()),
    }


def _together(training: Training, state: SavedState, parallel: Parallel) -> RandomState | None:
    optimizer, schedule = training.optimizer, training.schedule
    shards: dict[str, Tensor] = {}
    by_place: dict[int, dict[str, Tensor]] = {}
    with torch.no_grad(), state.tensors() as saved:
        for place, (name, parameter) in enumerate(training.trained.items()):
            apart = state.is_sharded or isinstance(parameter, DTensor)
            if apart:
                shards[_TRAINED + name] = parameter.detach()
            else:
                parameter.copy_(saved(_TRAINED + name))
            if not state.values["moments"]:
                continue
            by_place[place] = {"step": saved(f"{_OPTIMIZER}step.{name}")}
            for field in _MOMENTS:
                key = f"{_OPTIMIZER}{field}.{name}"
                by_place[place][field] = torch.zeros_like(parameter) if apart else saved(key)
                if apart:
                    shards[key] = by_place[place][field]
    if shards:
        read_shards(state.path, shards, parallel.ranks)
    optimizer.load_state_dict({"state": by_place, "param_groups": optimizer.state_dict()["param_groups"]})
    schedule.load_state_dict(state.values["schedule"])
    for group, lr in zip(optimizer.param_groups, schedule.get_last_lr(), strict=True):
        group["lr"] = lr
    return _random_of(state, parallel)


def _random_of(state: SavedState, parallel: Parallel) -> RandomState | None:
    ranks = state.values["random"]
    if len(ranks) != parallel.world:
        if parallel.is_main:
            log.warning(
                "%s was saved by %d ranks, there are %d now: the data goes on as it would have, but dropout draws anew "
                "and sums may round differently",
                state.path,
                len(ranks),
                parallel.world,
            )
        return None
    own, prefix = ranks[parallel.rank], f"{_RANDOM}{parallel.rank}."
    with state.tensors() as saved:
        cpu = saved(prefix + "torch")
        accelerator = saved(prefix + "accelerator") if prefix + "accelerator" in state.names else None
    return RandomState(
        torch=cpu,
        accelerator=accelerator,
        python=_python_state(own["python"]),
        numpy=_arrays(own["numpy"]),
    )


def _plain(numpy_state: dict[str, Any]) -> dict[str, Any]:
    """JSON-able: the generator's array as a list."""
    inner = numpy_state["state"]
    return {**numpy_state, "state": {"key": inner["key"].tolist(), "pos": int(inner["pos"])}}


def _arrays(plain: dict[str, Any]) -> dict[str, Any]:
    inner = plain["state"]
    return {**plain, "state": {"key": np.array(inner["key"], dtype=np.uint32), "pos": inner["pos"]}}


def _python_state(plain: list[Any]) -> tuple[Any, ...]:
    """JSON knows no tuples."""
    version, words, gauss = plain
    return (version, tuple(words), gauss)
