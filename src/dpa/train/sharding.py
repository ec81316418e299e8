"""Weights over ranks: from one rank's copy to all, cut into shards (FSDP2), and back.

Only rank 0 reads a model's files; the other ranks have its shapes on the meta device. What is not sharded is filled by
broadcast. What is sharded is filled and cut layer by layer, so that no rank ever holds more than a layer (or the
embeddings and the head) of what it keeps a share of.

*Precision.* As under DDP: the optimizer's weights are float32, matrix products read bfloat16, all else float32. FSDP
rounds a unit's weights before it sends them, which is what autocast would do to those of linear layers, and only to
those; so norms are units of their own, sent as float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import Parameter

from dpa.models.vlm import decoder
from dpa.train.step import TrainStep

_LOW = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
_FULL = MixedPrecisionPolicy(cast_forward_inputs=False)


def materialise(module: nn.Module, device: torch.device) -> None:
    """Gives tensors of the meta device memory on ``device``, not filled. Shared ones stay shared."""
    made: dict[int, Tensor] = {}
    for tensors, name, tensor in list(_tensors(module)):
        if not tensor.is_meta:
            continue
        if id(tensor) not in made:
            empty = torch.empty_like(tensor, device=device)
            is_parameter = isinstance(tensor, Parameter)
            made[id(tensor)] = Parameter(empty, requires_grad=tensor.requires_grad) if is_parameter else empty
        tensors[name] = made[id(tensor)]


def fill_from_main(module: nn.Module, device: torch.device) -> None:
    """Moves the module to ``device`` and gives it rank 0's values. All ranks call it.

    Whoever holds tensors on the meta device gets memory for them. Tensors that are shards already are left alone.
    """
    materialise(module, device)
    seen: set[int] = set()
    for tensors, name, tensor in list(_tensors(module)):
        if isinstance(tensor, DTensor) or id(tensor) in seen:
            continue
        if isinstance(tensor, Parameter):
            tensor.data = tensor.data.to(device)
        else:
            tensors[name] = tensor = tensor.to(device)
        seen.add(id(tensor))
        assert tensor.is_contiguous(), f"{name}: a view"
        dist.broadcast(tensor.detach(), src=0)


def shard(step: TrainStep, device: torch.device, *, gathered: bool = False) -> None:
    """Cuts the trained weights over all ranks, in place; frozen ones are whole on every rank. All ranks call it.

    ZeRO-3 (Rajbhandari et al., 2020): each layer is gathered for each pass and for the backward, and freed behind it.
    With ``gathered`` ZeRO-2: once a step, and freed behind its last backward (:func:`gather_until`).

    Afterwards the step's forward is the only way in: both passes and the head run inside it.

    Args:
        step: on rank 0 with weights, on any device.
        device: this rank's.
        gathered: keep layers whole from a step's first pass on.
    """
    step.in_shards = True
    mesh = dist.device_mesh.init_device_mesh(device.type, (dist.get_world_size(),))
    low = step.computes_in == torch.bfloat16
    for layer in decoder(step.model).layers:
        fill_from_main(layer, device)
        for norm in _kept_whole(layer) if low else ():
            # not freed between the passes: they are tiny, and each gathering has its price
            fully_shard(norm, mesh=mesh, reshard_after_forward=False, mp_policy=_FULL)
        fully_shard(layer, mesh=mesh, reshard_after_forward=not gathered, mp_policy=_LOW if low else _FULL)
    fill_from_main(step, device)
    frozen = {value for value in step.parameters() if not value.requires_grad}
    fully_shard(step, mesh=mesh, reshard_after_forward=False, mp_policy=_FULL, ignored_params=frozen)


def gather_until(step: nn.Module, *, last: bool) -> None:
    """Before a micro-batch of a step that was cut with ``gathered``: weights stay whole behind it, but for the last."""
    assert isinstance(step, FSDPModule)
    step.set_reshard_after_backward(last)


def _kept_whole(layer: nn.Module) -> list[nn.Module]:
    """The modules of a layer whose own weights autocast leaves in float32."""
    return [
        module
        for module in layer.modules()
        if not isinstance(module, nn.Linear) and any(True for _ in module.parameters(recurse=False))
    ]


def unshard(model: nn.Module, *, keep: bool) -> None:
    """Puts shards together, one tensor at a time, on the CPU; without ``keep`` nothing of them is left here.

    All ranks call it. The model is no longer to be run: its hooks still expect shards.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    made: dict[int, Tensor] = {}
    for tensors, name, tensor in list(_tensors(model)):
        if id(tensor) not in made:
            full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            full = full.detach().to("cpu" if keep else "meta")
            is_parameter = isinstance(tensor, Parameter)
            made[id(tensor)] = Parameter(full, requires_grad=tensor.requires_grad) if is_parameter else full
        tensors[name] = made[id(tensor)]


def _tensors(module: nn.Module) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
    """(where it is registered, name, tensor): parameters and buffers, also those that no file holds."""
    for owner in module.modules():
        for tensors in (owner._parameters, owner._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    yield tensors, name, tensor
