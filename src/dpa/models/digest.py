"""Fingerprints of weights: the proof that stage 3's LLM is the original one and an adapter belongs to its LLM."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors import safe_open
from torch import Tensor, nn

from dpa.errors import ModelError

_Loaders = Mapping[str, Callable[[], Tensor]]

_LLM_NAMES: tuple[tuple[str, str], ...] = (
    ("model.language_model.", "model."),  # LLaVA in memory
    ("language_model.lm_head.", "lm_head."),  # LLaVA on disk
    ("language_model.model.", "model."),
    ("lm_head.", "lm_head."),
    ("model.", "model."),  # an LLM alone; last, because LLaVA's names begin with it too
)
_NOT_LLM = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")


def digest_of_model(source: Path | Mapping[str, Tensor], *, cast: torch.dtype | None = None) -> str:
    """sha256 (hex) over name, dtype, shape and bytes of all tensors, sorted by name.

    Args:
        source: a folder with safetensors (else ``.bin``) weights, read one tensor at a time, or a state dict.
        cast: convert floating-point tensors first. Weights stored in bfloat16 and loaded as float32 give the same
            digest as their file with ``cast=torch.float32``; None takes them as they are.

    Raises:
        ModelError: the folder holds no weights.
    """
    with _opened(source) as tensors:
        return _digest(tensors, cast)


def digest_of_llm(source: Path | nn.Module, *, cast: torch.dtype | None = None) -> str:
    """The same for the LLM inside: equal for an LLM's folder, the LLM in memory, and a LLaVA that holds it.

    A head that is tied to the embeddings does not count: some files store it, some do not.

    Args:
        source: folder of an LLM or of a LLaVA, or such a model.
        cast: see ``digest_of_model``. Compare a folder with memory at the dtype of the memory.
    """
    with _opened(source.state_dict() if isinstance(source, nn.Module) else source) as tensors:
        named = {ours: load for name, load in tensors.items() if (ours := llm_name(name)) is not None}
        head, embeddings = named.get("lm_head.weight"), named.get("model.embed_tokens.weight")
        if head is not None and embeddings is not None and torch.equal(head(), embeddings()):
            del named["lm_head.weight"]
        return _digest(named, cast)


def digest_of_part(part: str, revision: str | None = None) -> str:
    """``digest_of_model`` of a folder or a hub id's local copy (what ``resolve_part`` returned).

    Raises:
        ModelError: a hub id that is not in the local cache and cannot be fetched.
    """
    if Path(part).is_dir():
        return digest_of_model(Path(part))
    try:
        folder = snapshot_download(part, revision=revision, allow_patterns=["*.safetensors", "pytorch_model*.bin"])
    except (OSError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise ModelError(f"weights of {part!r} are neither in the local cache nor reachable: {error}") from None
    return digest_of_model(Path(folder))


def llm_name(name: str) -> str | None:
    if name.startswith(_NOT_LLM):
        return None
    for theirs, ours in _LLM_NAMES:
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return None


def _digest(tensors: _Loaders, cast: torch.dtype | None) -> str:
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]().detach()
        if cast is not None and tensor.is_floating_point():
            tensor = tensor.to(cast)
        total.update(f"{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        total.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()


@contextmanager
def _opened(source: Path | Mapping[str, Tensor]) -> Iterator[_Loaders]:
    """Names -> how to get the tensor; of a folder one at a time, so that a large model never lies in memory."""
    if not isinstance(source, Path):
        yield {name: _given(tensor) for name, tensor in source.items()}
        return
    files = sorted(source.glob("*.safetensors"))
    if not files:
        yield {name: _given(tensor) for name, tensor in _pickled(source).items()}
        return
    with ExitStack() as stack:
        opened = [stack.enter_context(safe_open(file, framework="pt")) for file in files]
        yield {name: partial(handle.get_tensor, name) for handle in opened for name in handle.keys()}  # noqa: SIM118 (no iterator)


def _given(tensor: Tensor) -> Callable[[], Tensor]:
    return lambda: tensor


def _pickled(folder: Path) -> dict[str, Tensor]:
    files = sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise ModelError(f"{folder} has no weights (*.safetensors or pytorch_model*.bin)")
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            tensors |= torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except (pickle.UnpicklingError, RuntimeError) as error:
            raise ModelError(f"{file} cannot be read as tensors alone: {str(error).splitlines()[0]}") from None
    return tensors
