"""The dtype of an export, and what rounding to it does."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from dpa.errors import UserError

DtypeName = Literal["bf16", "fp16", "fp32"]
DTYPES: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def dtype_of(name: str | None, model: nn.Module) -> torch.dtype:
    """The dtype to write: the named one, else the widest that the checkpoint is stored in.

    Raises:
        UserError: no such dtype.
    """
    if name is None:
        return max((parameter.dtype for parameter in model.parameters()), key=lambda kind: kind.itemsize)
    if name not in DTYPES:
        raise UserError(f"--dtype {name}: no such dtype; choose {', '.join(DTYPES)}")
    return DTYPES[name]


@torch.no_grad()
def round_to(model: nn.Module, dtype: torch.dtype) -> None:
    """Rounds every weight of a float32 model as an export in ``dtype`` does; it stays float32.

    Raises:
        UserError: float16 cannot hold a weight.
    """
    for name, parameter in model.named_parameters():
        rounded = parameter.to(dtype)
        if not torch.isfinite(rounded).all():
            largest = float(parameter.abs().max())
            raise UserError(f"{name} holds {largest:.3g}, and float16 ends at 65504: choose --dtype bf16 or fp32")
        parameter.copy_(rounded)
