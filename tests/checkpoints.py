"""A tiny checkpoint of ours on disk, for tests of what reads checkpoints."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from dpa.models.checkpoint_io import save_checkpoint
from dpa.models.settings import ModelSettings
from dpa.models.vlm import build_vlm
from dpa.testing.parts import write_tiny_llm, write_tiny_tower
from dpa.testing.tiny_families import TinyFamily


def write_tiny_checkpoint(folder: Path, family: TinyFamily = "qwen2", *, seed: int = 0) -> Path:
    """Writes ``llm``, ``tower``, ``checkpoint`` and ``picture.png`` below ``folder``; returns the checkpoint."""
    llm = write_tiny_llm(folder / "llm", family, seed=seed)
    tower = write_tiny_tower(folder / "tower", "clip", seed=seed)
    vlm = build_vlm(ModelSettings(llm=str(llm), vision_tower=str(tower)), seed=seed)
    save_checkpoint(vlm, folder / "checkpoint")
    picture = Image.linear_gradient("L").resize((40, 24))
    Image.merge("RGB", (picture, picture.rotate(180), picture)).save(folder / "picture.png")
    return folder / "checkpoint"
