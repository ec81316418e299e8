"""Reads what a run left in its folder; the only I/O of reports and comparisons besides writing them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dpa.errors import UserError
from dpa.evaluate.scores import PREDICTIONS, Scored, read_scores, scores_path

METRICS = "metrics.jsonl"
PROBES = "probe.jsonl"
"""Of stage 2, where the lab's words were probed: a line per probe, ``step`` and the names of ``lab.probe.probe``."""
MAPS = "maps.jsonl"
"""Of stages 2 and 3: relevance of the tokens of a few samples; see ``analyze.maps``."""
LINES = (METRICS, PROBES, MAPS)
"""Files of lines that a stage leaves beside its artefact and a run's folder gathers, in the order of the stages."""


@dataclass(frozen=True, slots=True)
class Run:
    """A run's folder and its ``summary.json``."""

    folder: Path
    summary: dict[str, Any]

    @property
    def name(self) -> str:
        """As in the recipe."""
        return str(self.summary["name"])

    @property
    def methods(self) -> tuple[str, ...]:
        """The main one first."""
        return tuple(self.summary["methods"])

    def folder_of(self, method: str) -> Path:
        """Where a method's artefacts lie: the main one's at the top."""
        return self.folder if method == self.summary["main_method"] else self.folder / method

    def evaluation(self, method: str) -> dict[str, dict[str, Any]]:
        """Benchmark -> result; empty where the run did not evaluate (yet)."""
        found: dict[str, dict[str, Any]] = self.summary["methods"][method].get("evaluation", {})
        return found

    def metrics(self, method: str) -> list[dict[str, Any]]:
        """The optimizer steps of ``metrics.jsonl``; empty where there is none yet. Evaluations (lines with a ``kind``)
        are left out."""
        return [row for row in self.lines(method, METRICS) if "kind" not in row]

    def evaluations(self, method: str) -> list[dict[str, Any]]:
        """The evaluations on stage 3's way, of ``metrics.jsonl``: ``step``, ``stage``, ``benchmarks``."""
        from dpa.train.metrics import EVALUATION  # brings torch, which comparing needs not wait for

        return [row for row in self.lines(method, METRICS) if row.get("kind") == EVALUATION]

    def lines(self, method: str, name: str) -> list[dict[str, Any]]:
        """Of one of :data:`LINES`; empty where there is none yet. A line that is being written is left out."""
        path = self.folder_of(method) / name
        if not path.is_file():
            return []
        rows = []
        for line in path.read_bytes().decode("utf-8", errors="replace").split("\n"):
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict):
                rows.append(row)
        return rows

    def scores(self, method: str, benchmark: str) -> list[Scored] | None:
        """Stored scores; None where there are none.

        Raises:
            CheckpointError: the file is broken.
        """
        path = scores_path(self.folder_of(method) / PREDICTIONS, benchmark)
        return read_scores(path) if path.is_file() else None

    def samples(self) -> list[dict[str, Any]]:
        """Content of ``samples.json``; empty where there is none.

        Raises:
            UserError: the file is no list of samples.
        """
        path = self.folder / "samples.json"
        if not path.is_file():
            return []
        try:
            samples = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read: {error}") from None
        needed = {"image", "question", "answer", "answers"}
        if not isinstance(samples, list) or not all(isinstance(item, dict) and needed <= set(item) for item in samples):
            raise UserError(f"{path}: a list of samples with {', '.join(sorted(needed))} is expected")
        return samples

    def recipe_text(self) -> str:
        """The resolved recipe as YAML; empty where there is none."""
        path = self.folder / "recipe.yaml"
        return path.read_text(encoding="utf-8") if path.is_file() else ""

    def recipe(self) -> dict[str, Any]:
        """The same as a tree."""
        tree = yaml.safe_load(self.recipe_text())
        return tree if isinstance(tree, dict) else {}


def read_run(folder: Path) -> Run:
    """The run in a folder.

    Raises:
        UserError: no run lies there, or its summary is not one of ours.
    """
    path = folder / "summary.json"
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder} is no run's folder: summary.json is missing (dpa run writes it)") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(summary, dict) or not {"name", "main_method", "methods"} <= set(summary):
        raise UserError(f"{path} is no summary of a run: it needs name, main_method and methods")
    return Run(folder=folder, summary=summary)
