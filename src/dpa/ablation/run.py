"""Runs the cells of an ablation one after the other; what is finished is read, what was interrupted continues."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dpa.ablation.grid import Cell
from dpa.analyze.runs import read_run
from dpa.errors import DpaError, UserError
from dpa.log import get_logger, said_once
from dpa.pipeline import dry_run, run
from dpa.pipeline.measure import MEASUREMENTS
from dpa.recipe import dump_recipe

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Failure:
    """A cell that did not come to its end."""

    title: str
    message: str


@dataclass(frozen=True, slots=True)
class Work:
    """What stands before a start."""

    cells: int
    finished: int
    stages: int
    """That the cells name."""
    different: int
    """Of these; the others are shared."""
    to_train: int
    """Different ones that are not in the store."""
    steps: int
    """Optimizer steps of those."""

    def text(self) -> str:
        """One line."""
        return (
            f"{self.cells} runs ({self.finished} finished), {self.stages} stages, {self.different} of them different; "
            f"{self.to_train} to train with {self.steps:,} steps in all"
        )


def is_finished(cell: Cell) -> bool:
    """The run lies there whole: the same recipe, all stages, evaluated and measured as it asks."""
    written = cell.folder / "recipe.yaml"
    try:
        if written.read_text(encoding="utf-8") != dump_recipe(cell.recipe):
            return False
        found = read_run(cell.folder)
    except (OSError, UserError):
        return False
    method = found.summary["methods"].get(cell.recipe.methods[0], {})
    wanted = set(cell.recipe.evaluate.benchmarks)
    measured = not cell.recipe.evaluate.after_pretrain or (cell.folder / MEASUREMENTS).is_file()
    return "finetune" in method.get("stages", {}) and wanted <= set(method.get("evaluation", {})) and measured


def look_ahead(cells: Sequence[Cell]) -> Work:
    """Checks every cell as ``dpa run --dry-run`` does and counts what there is to train.

    Raises:
        UserError: a cell cannot run; names it.
    """
    stages: dict[str, tuple[int, bool]] = {}
    named = 0
    with said_once():
        for cell in cells:
            try:
                rows = dry_run(cell.recipe).rows
            except UserError as error:
                raise type(error)(f"cell {cell.title}: {error}") from None
            named += len(rows)
            for row in rows:
                stages[str(row["store"])] = (int(row["steps"]), row["state"] == "finished")
    left = [steps for steps, finished in stages.values() if not finished]
    return Work(
        cells=len(cells),
        finished=sum(map(is_finished, cells)),
        stages=named,
        different=len(stages),
        to_train=len(left),
        steps=sum(left),
    )


def run_cells(cells: Sequence[Cell], *, tell: Callable[[str], None]) -> list[Failure]:
    """Trains what is missing.

    A cell that fails (not finite, a full disk) does not stop the others. What the user gave wrong does: it would
    fail in the next cell, too.

    Raises:
        UserError: wrong input; names the cell.
    """
    failures = []
    for number, cell in enumerate(cells, 1):
        if is_finished(cell):
            tell(f"[{number}/{len(cells)}] {cell.title}: finished before")
            continue
        tell(f"[{number}/{len(cells)}] {cell.title}")
        try:
            run(cell.recipe)
        except UserError as error:
            raise type(error)(f"cell {cell.title}: {error}") from None
        except DpaError as error:
            log.error("cell %s failed: %s", cell.title, error)
            failures.append(Failure(cell.title, str(error)))
    return failures
