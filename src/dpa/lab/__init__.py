"""The lab: a miniature world of scenes, two languages about them, and two tiny pretrained parts.

It makes the method runnable and testable without a download. Nothing is imported here; ask the modules:
``scenes``, ``render``, ``language``, ``questions`` (the world), ``make`` (its files), ``pretrain_llm`` and
``pretrain_tower`` (the shipped parts from nothing).
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Final

ASSETS: Final = ("llm", "tower")
"""The shipped parts, each a folder that transformers loads."""


def lab_asset(name: str) -> Path:
    """The folder of a shipped part: ``"llm"`` (Qwen2 and its tokenizer) or ``"tower"`` (CLIP vision and its processor).

    Raises:
        ValueError: no part has this name.
        FileNotFoundError: the part is missing from this installation.
    """
    if name not in ASSETS:
        raise ValueError(f"the lab has no part {name!r}; it has {', '.join(ASSETS)}")
    folder = Path(str(files(__name__) / "assets" / name))
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is missing; make it with: python -m dpa.lab.pretrain_{name} --out {folder}")
    return folder
