"""The recipe: every setting of a run, strict. Imports no torch, so that a wrong recipe is refused at once."""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from dpa.data.settings import DataSettings
from dpa.errors import RecipeError
from dpa.evaluate.settings import EvaluateSettings
from dpa.models.settings import LoraSettings, ModelSettings
from dpa.settings import Strict
from dpa.train.settings import ObjectiveName, ParallelName, StageSettings, TrainSettings

MethodName = Literal["vanilla", "cal", "pmo", "cmo", "dpa", "dpa-prior"]
StageName = Literal["proxy", "pretrain", "finetune"]
STAGES: tuple[StageName, ...] = ("proxy", "pretrain", "finetune")


class Method(Strict):
    """A point of the space (proxy: yes/no) x (objective per stage)."""

    proxy: bool
    pretrain: ObjectiveName
    finetune: ObjectiveName


METHODS: dict[MethodName, Method] = {
    "vanilla": Method(proxy=False, pretrain="uniform", finetune="uniform"),
    "cal": Method(proxy=False, pretrain="cal", finetune="cal"),
    "pmo": Method(proxy=True, pretrain="uniform", finetune="uniform"),
    "cmo": Method(proxy=False, pretrain="cmo", finetune="cmo"),
    "dpa": Method(proxy=True, pretrain="cmo", finetune="cmo"),
    "dpa-prior": Method(proxy=True, pretrain="prior", finetune="uniform"),
}
"""Paper, section 4.1 and table of components; CAL: arXiv 2405.17871; dpa-prior is ours (docs/evidence.md)."""


class ProxyStage(StageSettings):
    """Stage 1: LoRA on the captions' text alone (paper: 4e-5, 8192 tokens, micro-batch 16 on 8 GPUs)."""

    learning_rate: float = Field(default=4e-5, gt=0)
    max_length: int = Field(default=8192, ge=8)
    lora: LoraSettings = LoraSettings()

    @model_validator(mode="after")
    def _plain_and_uniform(self) -> ProxyStage:
        if self.format != "plain":
            raise ValueError("stage 1 reads captions alone: format must be plain")
        if self.objective not in (None, "uniform"):
            raise ValueError("stage 1 sees no image: objective must be uniform")
        return self


class PretrainStage(StageSettings):
    """Stage 2: the connector through the frozen (proxy) LLM (paper: 2e-3, 8192 tokens, micro-batch 32)."""

    learning_rate: float = Field(default=2e-3, gt=0)
    max_length: int = Field(default=8192, ge=8)
    micro_batch: int = Field(default=32, ge=1)


class FinetuneStage(StageSettings):
    """Stage 3: connector and original LLM (paper: 4e-5, 2048 tokens, micro-batch 8, grouped by modality and length)."""

    learning_rate: float = Field(default=4e-5, gt=0)
    micro_batch: int = Field(default=8, ge=1)
    format: Literal["plain", "chat"] = "chat"
    image_mode: Literal["crop", "pad"] = "pad"
    group_by_length: bool = True


class StagesSettings(Strict):
    """The three stages."""

    proxy: ProxyStage = ProxyStage()
    pretrain: PretrainStage = PretrainStage()
    finetune: FinetuneStage = FinetuneStage()


class Recipe(Strict):
    """Every setting of a run. ``extends`` (a path beside the recipe) is resolved before this model sees it."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Folder of the run below ``output``."""
    methods: tuple[MethodName, ...] = ("dpa",)
    """The first is the main one; ``method: x`` is shorthand for one."""
    seed: int = Field(default=0, ge=0)
    fidelity: Literal["exact", "official"] = "exact"
    """``official`` reproduces the reference implementation to the letter (method.md, table of deviations)."""
    parallel: ParallelName = "ddp"
    """How ranks share stage 3: ``ddp`` whole copies; ``zero2`` shards of gradients and optimizer states; ``zero3``, or
    ``fsdp``, of the weights, too (docs/scaling.md). Results are equal up to rounding."""
    gpus: int | None = Field(default=None, ge=1)
    """Ranks that the run is meant for; ``dpa plan`` counts with it. None: as many as the launcher starts."""
    output: Path = Path("runs")
    store: Path | None = None
    """Content-addressed store of finished stages; None: ``DPA_STORE`` or ``output/.store``."""
    model: ModelSettings = ModelSettings()
    data: DataSettings
    stages: StagesSettings = StagesSettings()
    train: TrainSettings = TrainSettings()
    evaluate: EvaluateSettings = EvaluateSettings()

    @model_validator(mode="before")
    @classmethod
    def _one_method(cls, value: Any) -> Any:
        if isinstance(value, Mapping) and "method" in value:
            rest = {key: item for key, item in value.items() if key not in ("method", "methods")}
            return {**rest, "methods": (value["method"],)}
        return value

    @field_validator("methods", mode="before")
    @classmethod
    def _methods_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if not self.methods:
            raise ValueError("methods is empty: name at least one of " + ", ".join(METHODS))
        if len(set(self.methods)) != len(self.methods):
            raise ValueError(f"methods names one method twice: {', '.join(self.methods)}")
        if not self.data.captions and self.model.start_from is None:
            raise ValueError("data.captions is missing")
        if self.train.compile and self.fidelity == "official":
            raise ValueError(
                "train.compile is not for fidelity official, which sets hooks that compiled layers do not call: leave "
                "train.compile off, or choose fidelity exact"
            )
        for name, stage in (("proxy", self.stages.proxy), ("finetune", self.stages.finetune)):
            if stage.objective == "spans":
                raise ValueError(f"stages.{name}.objective spans: only stage 2's captions are marked (visual_spans)")
        if self.stages.pretrain.objective == "spans" and self.stages.pretrain.format != "plain":
            raise ValueError(
                "stages.pretrain.objective spans reads what captions mark: set stages.pretrain.format=plain"
            )
        if self.evaluate.benchmarks and self.evaluate.data is None:
            raise ValueError("evaluate.benchmarks needs evaluate.data, the folder of the benchmark's files")
        if self.evaluate.every_steps is not None and not self.evaluate.benchmarks:
            raise ValueError("evaluate.every_steps needs evaluate.benchmarks, which it asks a few questions of")
        return self

    def objective(self, method: MethodName, stage: StageName) -> ObjectiveName:
        """The objective of a stage under a method; a stage's own ``objective`` wins over the method's."""
        own: ObjectiveName | None = {
            "proxy": self.stages.proxy.objective,
            "pretrain": self.stages.pretrain.objective,
            "finetune": self.stages.finetune.objective,
        }[stage]
        if own is not None:
            return own
        if stage == "proxy":
            return "uniform"
        return METHODS[method].pretrain if stage == "pretrain" else METHODS[method].finetune


def load_recipe(path: str | Path, overrides: Iterable[str] | Mapping[str, Any] = ()) -> Recipe:
    """Reads a recipe, resolves ``extends``, applies overrides.

    Args:
        path: YAML file.
        overrides: ``"key=value"`` strings (dotted keys, values in YAML: ``stages.pretrain.learning_rate=1e-3``) or a
            mapping of dotted keys to values. They win over the file.

    Raises:
        RecipeError: missing file, not YAML, unknown key (with the nearest name), wrong value; every problem is listed.
    """
    path = Path(path)
    tree = _read_tree(path, ())
    for key, value in _pairs(overrides):
        _set(tree, key, value)
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise RecipeError(f"{path}: " + "; ".join(_explain(item) for item in error.errors())) from None


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML; ``load_recipe`` of it gives the same recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def read_tree(path: str | Path, *, extended: bool = True) -> dict[str, Any]:
    """A YAML file of settings with its ``extends`` resolved (``extended=False``: as it stands), not yet checked.

    Raises:
        RecipeError: missing file, not YAML, or no mapping.
    """
    return _read_tree(Path(path), ()) if extended else _read_file(Path(path))


def split_override(item: str) -> tuple[str, Any]:
    """``key=value`` as key and value, the value in YAML.

    Raises:
        RecipeError: it has no such form.
    """
    return _pairs([item])[0]


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 2e-3 as a string; people write it as a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*(\.[\d_]*)?|\.\d[\d_]*)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # _Loader is a SafeLoader
    except yaml.YAMLError as error:
        raise RecipeError(f"{where}: not valid YAML: {error}") from None


def _read_tree(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in seen:
        raise RecipeError(f"{path}: extends itself through {' -> '.join(str(item) for item in seen)}")
    tree = _read_file(path)
    parent = tree.pop("extends", None)
    if parent is None:
        return tree
    base = _read_tree(path.parent / str(parent), (*seen, path.resolve()))
    if "method" in tree:
        base.pop("methods", None)
    if "methods" in tree:
        base.pop("method", None)
    return _merge(base, tree)


def _read_file(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such recipe{_nearby(path)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read: {error}") from None
    tree = _parse_yaml(text, str(path))
    if not isinstance(tree, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of settings, this is {type(tree).__name__}")
    return dict(_unshared(tree))


def _unshared(value: Any) -> Any:
    """A copy in which what a YAML alias (``*name``) repeats is repeated: an override must reach one place only."""
    if isinstance(value, dict):
        return {key: _unshared(item) for key, item in value.items()}
    return [_unshared(item) for item in value] if isinstance(value, list) else value


def _nearby(path: Path) -> str:
    names = [str(item) for item in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
    close = difflib.get_close_matches(str(path), names, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def _merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in top.items():
        below = merged.get(key)
        merged[key] = _merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def _pairs(overrides: Iterable[str] | Mapping[str, Any]) -> list[tuple[str, Any]]:
    if isinstance(overrides, Mapping):
        return [(str(key), value) for key, value in overrides.items()]
    pairs = []
    for item in overrides:
        key, equals, value = item.partition("=")
        if not equals or not key.strip():
            raise RecipeError(f"{item!r}: an override has the form key=value, e.g. stages.pretrain.learning_rate=1e-3")
        pairs.append((key.strip(), _parse_yaml(value, item)))
    return pairs


def _set(tree: dict[str, Any], key: str, value: Any) -> None:
    if key == "extends":
        raise RecipeError("extends cannot be overridden: give the other recipe as the argument")
    if key in ("method", "methods"):
        tree.pop("method", None)
        tree.pop("methods", None)
    *parents, last = key.split(".")
    node = tree
    for depth, part in enumerate(parents):
        below = node.setdefault(part, {})
        if not isinstance(below, dict):
            # "captions: file.json" stands for {"path": "file.json"}: open it up so that one field can be overridden.
            if isinstance(below, str) and parents[:2] == ["data", part]:
                below = {"path": below}
            elif isinstance(below, list) and len(below) == 1 and isinstance(below[0], dict):
                below = below[0]
            else:
                raise RecipeError(f"{key}: {'.'.join(parents[: depth + 1])} is a value, not a group of settings")
            node[part] = below
        node = below
    node[last] = value


def _explain(error: Any) -> str:
    place = ".".join(str(part) for part in error["loc"]) or "recipe"
    if error["type"] == "extra_forbidden":
        return f"unknown key {place}{_nearest(error['loc'])}"
    if error["type"] == "missing":
        return f"{place} is missing"
    message = error["msg"].removeprefix("Value error, ")
    given = "" if isinstance(error["input"], Mapping) else f" (got {error['input']!r})"
    return f"{place}: {message}{given}" if error["loc"] else message


def _nearest(location: tuple[str | int, ...]) -> str:
    model: type[BaseModel] | None = Recipe
    for part in location[:-1]:
        if isinstance(part, int):
            continue
        model = _model_of(model.model_fields[part].annotation) if model and part in model.model_fields else None
    if model is None:
        return ""
    names = [*model.model_fields, *(["method", "extends"] if model is Recipe else [])]
    close = difflib.get_close_matches(str(location[-1]), names, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; known: {', '.join(names)}"


def _model_of(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, tuple):
        return next((found for found in map(_model_of, typing.get_args(annotation)) if found), None)
    return None
