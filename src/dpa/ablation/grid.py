"""The file of an ablation and the runs that it stands for."""

from __future__ import annotations

import difflib
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pydantic import Field, ValidationError, ValidationInfo, field_validator, model_validator

from dpa.errors import RecipeError
from dpa.recipe import METHODS, Recipe, load_recipe, read_tree, split_override
from dpa.settings import Strict

Overrides = dict[str, Any]
"""Dotted keys of a recipe -> values."""

SEEDS = (0, 1, 2)
_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
_NO_FOLDER = "/\\|"
"""What names of folders and columns of tables cannot hold."""
_COLUMNS = ("method", "seed", "metric", "value")


class Ablation(Strict):
    """What is compared. Every cell of the grid is an ordinary run of the base recipe with overrides."""

    name: str = Field(pattern=_NAME)
    """Folder below ``output``."""
    base: Path
    """Recipe; relative to this file's folder."""
    output: Path = Path("runs")
    methods: dict[str, Overrides]
    """Label -> overrides. A label that is a method's name means that method; others name theirs (``method: dpa``)."""
    seeds: tuple[int, ...] = SEEDS
    baseline: str = "vanilla"
    """Label that the others are compared with; the first where there is no such label."""
    axes: dict[str, dict[str, Overrides]] = Field(default_factory=dict)
    """Axis -> point -> overrides; the grid is their product."""
    set: Overrides = Field(default_factory=dict)
    """Overrides of every cell."""
    exclude: tuple[dict[str, str], ...] = ()
    """Cells that are left out: axis, ``method`` -> point or label; what is not named matches all."""
    metrics: tuple[str, ...] = ()
    """What is tabulated and drawn, names of results.csv; empty: every benchmark's accuracy."""
    threshold: float | None = None
    """Nats per token of stage 2: ``pretrain.samples_to_threshold`` counts samples until the moving mean is below."""
    probe_thresholds: dict[str, float] = Field(default_factory=dict)
    """Number of a probe (``evaluate.probe_steps``) -> value: ``pretrain.samples_to.NAME`` counts samples until the
    number is that high, linearly between probes."""

    @field_validator("methods", mode="before")
    @classmethod
    def _labels(cls, value: Any) -> Any:
        return {name: {} for name in value} if isinstance(value, list | tuple) else value

    @field_validator("methods")
    @classmethod
    def _known(cls, value: dict[str, Overrides]) -> dict[str, Overrides]:
        if not value:
            raise ValueError("name at least one method")
        for label, overrides in value.items():
            if label not in METHODS and "method" not in overrides:
                near = difflib.get_close_matches(label, METHODS, n=1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise ValueError(f"{label!r} is no method{hint}; a label of your own names one: {{method: dpa, ...}}")
        return value

    @field_validator("seeds")
    @classmethod
    def _some_seeds(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if not value or len(set(value)) != len(value):
            raise ValueError("name at least one seed, none twice")
        return value

    @field_validator("methods", "axes")
    @classmethod
    def _are_folders(cls, value: dict[str, dict[str, Any]], info: ValidationInfo) -> dict[str, dict[str, Any]]:
        of_axes = [point for points in value.values() for point in points] if info.field_name == "axes" else []
        for name in (*value, *of_axes):
            if not name.isprintable() or name.strip(". ") == "" or set(name) & set(_NO_FOLDER):
                raise ValueError(f"{name!r}: folders and columns are named after it; leave out {' '.join(_NO_FOLDER)}")
        return value

    @field_validator("axes")
    @classmethod
    def _points(cls, value: dict[str, dict[str, Overrides]]) -> dict[str, dict[str, Overrides]]:
        for axis, points in value.items():
            if axis in _COLUMNS:
                raise ValueError(
                    f"an axis cannot be called {axis}, which results.csv has a column of; name it otherwise"
                )
            if not points:
                raise ValueError(f"axis {axis} has no point")
        return value

    @model_validator(mode="after")
    def _names_are_known(self) -> Self:
        if "baseline" in self.model_fields_set and self.baseline not in self.methods:
            near = difflib.get_close_matches(self.baseline, self.methods, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(self.methods)}"
            raise ValueError(f"baseline: {self.baseline!r} is none of the methods{hint}")
        for key in (key for rule in self.exclude for key in rule):
            if key not in (*self.axes, "method"):
                raise ValueError(f"exclude: there is no axis {key!r}; there are {', '.join((*self.axes, 'method'))}")
        return self

    @field_validator("methods", "set")
    @classmethod
    def _in_dots(cls, value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        return _dotted(value) if info.field_name == "set" else {name: _dotted(own) for name, own in value.items()}

    @field_validator("axes")
    @classmethod
    def _points_in_dots(cls, value: dict[str, dict[str, Overrides]]) -> dict[str, dict[str, Overrides]]:
        return {axis: {name: _dotted(own) for name, own in points.items()} for axis, points in value.items()}

    @property
    def folder(self) -> Path:
        """``output/NAME``."""
        return self.output / self.name


def _dotted(overrides: Mapping[str, Any], above: str = "") -> Overrides:
    """``stages: {pretrain: {max_steps: 1}}`` as ``stages.pretrain.max_steps``: a group would replace all of the base's.
    A source of data stays whole."""
    flat: Overrides = {}
    for name, value in overrides.items():
        key = f"{above}{name}"
        flat |= (
            _dotted(value, f"{key}.") if isinstance(value, Mapping) and not key.startswith("data.") else {key: value}
        )
    return flat


@dataclass(frozen=True, slots=True)
class Cell:
    """One run."""

    point: tuple[tuple[str, str], ...]
    """Axis and point, in the axes' order."""
    method: str
    """The label."""
    seed: int
    recipe: Recipe
    group: str
    """Cells of a group share stages: a shard takes whole groups."""

    @property
    def folder(self) -> Path:
        """Of the run."""
        return self.recipe.output / self.recipe.name

    @property
    def title(self) -> str:
        """For messages."""
        return ", ".join([*(f"{axis} {point}" for axis, point in self.point), self.method, f"seed {self.seed}"])


def load_ablation(path: Path, overrides: Iterable[str] = (), *, seeds: Sequence[int] | None = None) -> Ablation:
    """Reads an ablation file, or a recipe: then its methods are compared.

    Args:
        path: YAML.
        overrides: ``key=value``; keys of :class:`Ablation` change it, all others every cell's recipe.
        seeds: in place of the file's.

    Raises:
        RecipeError: missing file, unknown key (with the nearest name), wrong value.
    """
    tree = read_tree(path)
    if "base" not in tree:
        recipe = load_recipe(path)
        tree = {"name": recipe.name, "base": str(path.resolve()), "output": recipe.output, "methods": recipe.methods}
    else:
        tree["base"] = str(path.parent / str(tree["base"]))
    _check_nothing(path)
    if isinstance(tree.get("methods"), dict):
        tree["methods"] = _named(tree["methods"])
    if isinstance(tree.get("axes"), dict):
        points = _named(tree["axes"])
        tree["axes"] = {axis: _named(of) if isinstance(of, dict) else of for axis, of in points.items()}
    common: Overrides = {}
    for item in overrides:
        key, value = split_override(item)
        if key in Ablation.model_fields:
            tree[key] = value
        else:
            common[key] = value
    if not isinstance(tree.get("set") or {}, dict):
        raise RecipeError(f"{path}: set: a mapping of dotted keys to values is expected, e.g. {{train.threads: 1}}")
    tree["set"] = dict(tree.get("set") or {}) | common
    if seeds is not None:
        tree["seeds"] = tuple(seeds)
    unknown = [key for key in tree if key not in Ablation.model_fields]
    if unknown:
        near = difflib.get_close_matches(unknown[0], Ablation.model_fields, n=1)
        hint = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(Ablation.model_fields)}"
        raise RecipeError(f"{path}: unknown key {unknown[0]}{hint}")
    try:
        return Ablation.model_validate(tree)
    except ValidationError as error:
        told = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise RecipeError(f"{path}: {told}") from None


def _check_nothing(path: Path) -> None:
    """``vanilla:`` with nothing behind it may be meant as "no overrides" where no file below names it.

    Raises:
        RecipeError: a name is left out that nothing names.
    """
    own = read_tree(path, extended=False)
    parent = read_tree(path.parent / str(own["extends"])) if own.get("extends") else {}
    groups = [("methods", own.get("methods"), parent.get("methods")), ("axes", own.get("axes"), parent.get("axes"))]
    for axis, points in (own.get("axes") or {}).items() if isinstance(own.get("axes"), dict) else ():
        groups.append((f"axes.{axis}", points, (parent.get("axes") or {}).get(axis)))
    for where, named, below in groups:
        for name, value in named.items() if isinstance(named, dict) else ():
            if value is None and name not in (below or ()):
                raise RecipeError(f"{path}: {where}.{name} is empty; write {name}: {{}} for one without overrides")


def _named(group: Mapping[str, Any]) -> dict[str, Any]:
    """``name: null`` in a file that extends another leaves out what that one names."""
    return {name: value for name, value in group.items() if value is not None}


def cells_of(ablation: Ablation) -> list[Cell]:
    """All cells, those that share stages beside each other.

    Raises:
        RecipeError: a cell's recipe is wrong; names the cell.
    """
    cells = []
    axes = list(ablation.axes)
    for chosen in itertools.product(*ablation.axes.values()):
        point = tuple(zip(axes, chosen, strict=True))
        for seed, label in itertools.product(ablation.seeds, ablation.methods):
            if not _excluded(ablation, {**dict(point), "method": label}):
                cells.append(_cell(ablation, point, label, seed))
    order = list(dict.fromkeys(cell.group for cell in cells))
    return sorted(cells, key=lambda cell: order.index(cell.group))  # stable


def shard_of(cells: Sequence[Cell], shard: str | None) -> list[Cell]:
    """The i-th of n parts ("i/n", from 1): whole groups, dealt in turn.

    Raises:
        RecipeError: not of the form i/n with 1 <= i <= n, or more parts than groups.
    """
    if shard is None:
        return list(cells)
    first, _, last = shard.partition("/")
    if not (first.isdigit() and last.isdigit() and 1 <= int(first) <= int(last)):
        raise RecipeError(f"--shard {shard}: expected i/n with 1 <= i <= n, e.g. 1/4")
    groups = list(dict.fromkeys(cell.group for cell in cells))
    if int(last) > len(groups):
        raise RecipeError(
            f"--shard {shard}: the runs are {len(groups)} groups that share stages, and a shard takes whole ones; n is "
            f"at most {len(groups)}"
        )
    mine = set(groups[int(first) - 1 :: int(last)])
    return [cell for cell in cells if cell.group in mine]


def _excluded(ablation: Ablation, where: Mapping[str, str]) -> bool:
    return any(all(where.get(axis) == point for axis, point in rule.items()) for rule in ablation.exclude)


def _cell(ablation: Ablation, point: tuple[tuple[str, str], ...], label: str, seed: int) -> Cell:
    overrides = dict(ablation.set)
    for axis, name in point:
        overrides |= ablation.axes[axis][name]
    own = ablation.methods[label]
    overrides |= own if "method" in own else {"method": label, **own}
    # before stage 3 and the evaluation, cells of one point and seed may share their stages
    early = {key: value for key, value in overrides.items() if not key.startswith(("stages.finetune", "evaluate."))}
    for key in {"method", *own}:
        early.pop(key, None)
    place = "_".join(f"{axis}-{name}" for axis, name in point) or "all"
    overrides |= {
        "seed": seed,
        "name": f"seed-{seed}",
        "output": str(ablation.folder / "cells" / place / label),
        "store": overrides.get("store", str(ablation.output / ".store")),
    }
    try:
        recipe = load_recipe(ablation.base, overrides)
    except RecipeError as error:
        where = ", ".join([*(f"{axis} {name}" for axis, name in point), label])
        raise RecipeError(f"cell {where}: {error}") from None
    return Cell(point, label, seed, recipe, group=json.dumps([seed, early], sort_keys=True, default=str))
