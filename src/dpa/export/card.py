"""The model card: what is known about an export, from its run's manifest. Nothing else is claimed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from dpa.export.origin import Gate, Origin

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def hub_id(name: Any) -> str | None:
    """``name`` if it can only be a repository of the hub."""
    return name if isinstance(name, str) and _HUB_ID.fullmatch(name) and not Path(name).exists() else None


def write_card(
    folder: Path,
    *,
    title: str,
    how: str,
    origin: Origin | None,
    gates: Sequence[Gate],
    library: str = "transformers",
    base: Sequence[str | None] = (),
    notes: Sequence[str] = (),
) -> None:
    """Writes ``README.md``.

    Args:
        folder: of the export.
        title: its heading.
        how: how to load it, as Markdown.
        origin: the checkpoint's papers.
        gates: what was compared.
        library: hub's ``library_name``.
        base: hub ids of what it was made from; None is left out.
        notes: further sentences.
    """
    front: dict[str, Any] = {"library_name": library, "tags": ["llava", "dpa"]}
    if library == "transformers":
        front["pipeline_tag"] = "image-text-to-text"
    if bases := [name for name in base if name is not None]:
        front["base_model"] = bases
    parts = [
        "---\n" + yaml.safe_dump(front, sort_keys=False) + "---",
        f"# {title}",
        how,
        *notes,
        "## How it was made",
        "\n".join(_training(origin)),
        "## Checked at export",
        "\n".join(f"- {gate.name}: {gate.state}. {gate.detail}" for gate in gates),
    ]
    (folder / "README.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def public(name: str | None) -> str | None:
    """A hub id as it is; of a folder its last part: where it lay is nobody's business."""
    return name if name is None or hub_id(name) or ":" in name else Path(name).name


def _training(origin: Origin | None) -> list[str]:
    """Bullets from manifest and recipe."""
    if origin is None or origin.stage is None:
        return ["Not known: no manifest of a run lay beside the checkpoint."]
    stage, inputs = origin.stage, origin.stage["inputs"]
    model = {} if origin.recipe is None else origin.recipe["model"]
    rows = [
        ("method", stage.get("method")),
        ("whole checkpoint that stage 3 started from", public(model.get("start_from"))),
        ("LLM", None if model.get("start_from") else public(model.get("llm"))),
        ("vision tower", None if model.get("start_from") else public(model.get("vision_tower"))),
        ("objective of stage 3", inputs.get("objective")),
        ("fidelity", inputs.get("fidelity")),
        ("precision", inputs.get("precision")),
        ("seed", inputs.get("seed")),
        ("digest of stage 3's data", inputs.get("data")),
        ("digest of the LLM's files", inputs.get("llm")),
        ("digest of the LLM's weights at the start of stage 3", stage.get("llm_at_start")),
        ("key of stage 3", stage.get("key")),
        ("versions", ", ".join(f"{name} {value}" for name, value in stage.get("versions", {}).items())),
    ]
    bullets = [f"- {name}: {value}" for name, value in rows if value is not None]
    settings = ", ".join(f"{name} {value}" for name, value in inputs.get("settings", {}).items())
    return [*bullets, f"- settings of stage 3: {settings}"]
