"""A run's folder: the resolved recipe, links to the stages' artefacts, metrics, summary, manifest, report."""

from __future__ import annotations

import os
import platform
import shutil
import time
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dpa.analyze.runs import LINES
from dpa.errors import UserError
from dpa.recipe import STAGES, MethodName, Recipe, StageName, dump_recipe
from dpa.results import ARTEFACTS, folder_of
from dpa.store import Entry, disk_errors, link, write_json, write_text

_PACKAGES = ("dpa", "torch", "transformers", "accelerate", "peft", "tokenizers", "safetensors", "numpy", "pillow")


@dataclass
class RunFolder:
    """``output/NAME``. The main method's artefacts lie at the top, each further method's in a folder of its name."""

    recipe: Recipe
    summary: dict[str, Any] = field(default_factory=dict)
    started: float = field(default_factory=time.time)

    def __post_init__(self) -> None:
        self.summary = {
            "name": self.recipe.name,
            "main_method": self.recipe.methods[0],
            "fidelity": self.recipe.fidelity,
            "seed": self.recipe.seed,
            "methods": {method: {"stages": {}, "evaluation": {}} for method in self.recipe.methods},
            "versions": versions(),
            "machine": machine(),
        }

    @property
    def path(self) -> Path:
        """The folder."""
        return self.recipe.output / self.recipe.name

    def of(self, method: MethodName) -> Path:
        """Where a method's artefacts are linked."""
        return folder_of(self.path, self.recipe, method)

    def prepare(self) -> None:
        """Makes the folder and writes the resolved recipe.

        Raises:
            UserError: the folder cannot be made, or something that is no run of ours lies there.
        """
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path} is a file; a run needs a folder: choose another name or output")
        if self.path.is_dir() and any(self.path.iterdir()) and not (self.path / "recipe.yaml").is_file():
            raise UserError(f"{self.path} holds files but no recipe.yaml of a run: choose another name or output")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.path}: cannot make the run's folder ({error.strerror})") from None
        with disk_errors(self.path):
            write_text(self.path / "recipe.yaml", dump_recipe(self.recipe))

    def training(self, method: MethodName, entry: Entry) -> None:
        """``current`` shows where the stage in progress writes."""
        with disk_errors(self.of(method)):
            self.of(method).mkdir(parents=True, exist_ok=True)
            link(entry.partial, self.of(method) / "current")

    def stage_done(self, method: MethodName, stage: StageName, entry: Entry, *, reused: bool) -> None:
        """Links a finished stage and adds its figures to the summary."""
        folder = self.of(method)
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "current").unlink(missing_ok=True)
            link(entry.folder / ARTEFACTS[stage], folder / ARTEFACTS[stage])
        manifest = entry.manifest()
        self.summary["methods"][method]["stages"][stage] = {
            "key": entry.key[:16],
            "reused": reused,
            **manifest["summary"],
        }
        if stage == "finetune":
            self.summary["methods"][method]["checkpoint"] = os.path.relpath(folder / ARTEFACTS[stage], self.path)
        self.write_summary()

    def write_lines(self, method: MethodName, entries: dict[StageName, Entry]) -> None:
        """``metrics.jsonl`` and its like: the stages' files, in their order; none where no stage has one."""
        for name in LINES:
            found = [entries[stage].folder / name for stage in STAGES if stage in entries]
            self._gather([path for path in found if path.is_file()], self.of(method) / name)

    def _gather(self, files: list[Path], target: Path) -> None:
        temporary = target.with_name(f"{target.name}.tmp")
        with disk_errors(target):
            if not files:
                target.unlink(missing_ok=True)  # of an earlier start with other settings
                return
            with open(temporary, "wb") as out:
                for path in files:
                    with open(path, "rb") as file:
                        shutil.copyfileobj(file, out)
            os.replace(temporary, target)

    def write_manifest(self, entries: dict[MethodName, dict[StageName, Entry]]) -> None:
        """``manifest.json``: every stage's own manifest, inputs and proofs included."""
        stages = {
            method: {stage: entry.manifest() for stage, entry in of.items() if entry.finished()}
            for method, of in entries.items()
        }
        with disk_errors(self.path):
            write_json(
                self.path / "manifest.json",
                {
                    "recipe": self.recipe.model_dump(mode="json"),
                    "versions": versions(),
                    "machine": machine(),
                    "methods": stages,
                },
            )

    def write_summary(self) -> None:
        """``summary.json``; ``seconds`` is this start's wall time."""
        self.summary["seconds"] = round(time.time() - self.started, 3)
        with disk_errors(self.path):
            write_json(self.path / "summary.json", self.summary)


def versions() -> dict[str, str]:
    """Versions of what decides numbers."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def machine() -> dict[str, Any]:
    """What ran it: system, processor, cores, accelerator."""
    import torch

    accelerator = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return {
        "system": platform.system(),
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": accelerator,
        "accelerators": torch.cuda.device_count() if accelerator else 0,
    }
