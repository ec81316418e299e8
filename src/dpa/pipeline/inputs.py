"""What the stages start from: model parts and data, each with the digest that its stage's key holds."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import AutoConfig
from transformers.utils.hub import cached_file

from dpa.data.audit import Audit, audit
from dpa.data.dataset import StageData
from dpa.data.images import ImageTransform
from dpa.data.records import read_records
from dpa.data.settings import DataSource
from dpa.log import get_logger
from dpa.models.connectors import tokens_per_image
from dpa.models.families import family_of, text_rules
from dpa.models.foreign import Opened, checkpoint_folder, open_checkpoint
from dpa.models.legacy import check_connector, read_connector
from dpa.models.parts import load_tokenizer, resolve_part, tower_config
from dpa.models.processor import make_image_processor
from dpa.objectives import objective
from dpa.recipe import STAGES, Recipe, StageName
from dpa.store import FileDigests, Store
from dpa.train.batches import StageBatches
from dpa.train.settings import StageSettings
from dpa.types import TextRules

log = get_logger(__name__)

_MODEL_FILES = (".json", ".jinja", ".safetensors", ".bin", ".model", ".txt", ".gguf")
"""What of a model folder decides its behaviour; notes and pictures do not."""


def store_of(recipe: Recipe) -> Store:
    """The recipe's store, else ``DPA_STORE``, else ``output/.store``."""
    root = recipe.store or os.environ.get("DPA_STORE") or recipe.output / ".store"
    return Store(Path(root))


@dataclass(frozen=True, slots=True)
class StageInput:
    """One stage's data, checked."""

    data: StageData
    """The kept samples."""
    audit: Audit

    def batches(self, recipe: Recipe, settings: StageSettings, rules: TextRules) -> StageBatches:
        """For the loop."""
        return StageBatches(
            data=self.data,
            lengths=self.audit.lengths,
            has_image=self.audit.has_image,
            labels=self.audit.labels,
            rules=rules,
            settings=settings,
            seed=recipe.seed,
            workers=recipe.data.workers,
        )


class Inputs:
    """Model parts and data of a recipe. What several stages read is opened and checked once."""

    def __init__(self, recipe: Recipe, store: Store) -> None:
        """
        Raises:
            ModelError: a part is missing, unknown, or does not fit.
            StorageError, UserError: the store cannot be written.
        """
        self.recipe = recipe
        self.cache = store.cache()
        self._digests = FileDigests(self.cache / "digests.json")
        self.start: Opened | None = None
        """The checkpoint that stage 3 starts from, if the recipe names one."""
        self.tokenizer: Any
        self.tower_config: Any
        if recipe.model.start_from is not None:
            folder = checkpoint_folder(recipe.model.start_from, recipe.model.start_from_revision)
            self.start = start = open_checkpoint(folder)
            self.tokenizer, self.rules = start.tokenizer, start.rules
            self.tower_config, self._llm_config = start.config.vision_config, start.config.text_config
        else:
            self.tokenizer, self.tower_config = load_tokenizer(recipe.model), tower_config(recipe.model)
            self._llm_config = AutoConfig.from_pretrained(
                resolve_part(recipe.model.llm),
                revision=recipe.model.llm_revision,
                trust_remote_code=recipe.model.trust_remote_code,
            )
            family = family_of(self._llm_config, self.tokenizer)
            self.rules = text_rules(family, self.tokenizer, tokens_per_image(recipe.model.connector, self.tower_config))
        self._stages: dict[StageName, StageInput] = {}

    @cached_property
    def start_from(self) -> str | None:
        """Digest of the files of the checkpoint that stage 3 starts from; None: it starts from parts."""
        return None if self.start is None else self._digests.folder(self.start.folder, suffixes=_MODEL_FILES)

    @cached_property
    def llm(self) -> str:
        """Digest of the original LLM's files, tokenizer included."""
        if self.start_from is not None:
            return self.start_from
        return self._part(self.recipe.model.llm, self.recipe.model.llm_revision)

    @cached_property
    def tower(self) -> str:
        """Digest of the vision tower's files."""
        if self.start_from is not None:
            return self.start_from
        return self._part(self.recipe.model.vision_tower, self.recipe.model.vision_tower_revision)

    @cached_property
    def connector_from(self) -> str | None:
        """Digest of the connector that stage 2 starts from; None: a fresh one."""
        path = self.recipe.model.connector_from
        if path is None:
            return None
        return self._digests.folder(path, suffixes=_MODEL_FILES) if path.is_dir() else self._digests.file(path)

    def digest(self) -> None:
        """Computes all digests, so that whoever comes later finds them in the cache."""
        _ = self.llm, self.tower, self.connector_from

    def check_connector(self) -> None:
        """Reads the connector that stage 2 starts from and compares its shapes with those of tower and LLM.

        Raises:
            ModelError: it cannot be read, or belongs to another LLM or tower.
        """
        path = self.recipe.model.connector_from
        if path is not None:
            state, kind = read_connector(path), self.recipe.model.connector
            tower, llm = self.tower_config.hidden_size, self._llm_config.get_text_config().hidden_size
            check_connector(state, path, tower=int(tower), llm=int(llm), kind=kind)

    def stage(self, stage: StageName) -> StageInput:
        """A stage's data, read and checked at the first call.

        Raises:
            DataError: a file is missing or malformed, or too many samples are unusable.
        """
        if stage not in self._stages:
            self._stages[stage] = self._open(stage)
        return self._stages[stage]

    def stage_data(self, stage: StageName) -> StageData:
        """A stage's samples as the recipe names them, not checked.

        Raises:
            DataError: a file is missing or malformed.
        """
        recipe, settings = self.recipe, settings_of(self.recipe, stage)
        sources = sources_of(recipe, stage)
        records = [read_records(source, self.cache, seed=recipe.seed) for source in sources]
        with_images = stage != "proxy"
        transform = None
        if with_images:
            processor = self.image_processor(settings)
            side = int(self.tower_config.image_size)
            transform = ImageTransform(processor, settings.image_mode, side, max_pixels=recipe.data.max_image_pixels)
        return StageData(
            records,
            self.tokenizer,
            self.rules,
            format=settings.format,
            with_images=with_images,
            max_length=settings.max_length,
            transform=transform,
            max_image_pixels=recipe.data.max_image_pixels,
            reduced_decode=recipe.data.reduced_decode and with_images,
            document_start=stage == "proxy" and recipe.fidelity == "exact",
            marks=settings.objective is not None and objective(settings.objective).needs_marks,
        )

    def _open(self, stage: StageName) -> StageInput:
        data = self.stage_data(stage)
        checked = audit(data, max_bad_share=self.recipe.data.max_bad_share, cache_dir=self.cache)
        if checked.quarantined:
            shown = "; ".join(f"{item.id} ({item.where}): {item.reason}" for item in checked.quarantined[:3])
            log.warning(
                "stage %s: %d of %d samples are left out: %s", stage, len(checked.quarantined), checked.samples, shown
            )
        return StageInput(data=data.select(checked.kept), audit=checked)

    def image_processor(self, settings: StageSettings) -> Any:
        """Of a stage: the tower's own values, the stage's way to make a picture square."""
        model = self.recipe.model
        if self.start is not None:
            model = model.model_copy(update={"vision_tower": str(self.start.folder)})
        return make_image_processor(model, self.tower_config, settings.image_mode)

    @property
    def llm_folder(self) -> Path:
        """Where the original LLM's files lie on this machine (with ``start_from``: the checkpoint that holds it)."""
        if self.start is not None:
            return self.start.folder
        source = resolve_part(self.recipe.model.llm)
        if Path(source).is_dir():
            return Path(source)
        return Path(str(cached_file(source, "config.json", revision=self.recipe.model.llm_revision))).parent

    def _part(self, name: str, revision: str | None) -> str:
        source = resolve_part(name)
        if Path(source).is_dir():
            return self._digests.folder(Path(source), suffixes=_MODEL_FILES)
        # A hub id: the local copy's folder is named after its commit, which fixes every file.
        config = cached_file(source, "config.json", revision=revision)
        return f"{source}@{Path(str(config)).parent.name}"


def sources_of(recipe: Recipe, stage: StageName) -> tuple[DataSource, ...]:
    """The files that a stage reads."""
    data = recipe.data
    if stage == "finetune":
        return data.instructions
    return data.captions if stage == "pretrain" or data.proxy_captions is None else data.proxy_captions


def settings_of(recipe: Recipe, stage: StageName) -> StageSettings:
    """A stage's settings."""
    of: dict[StageName, StageSettings] = {
        "proxy": recipe.stages.proxy,
        "pretrain": recipe.stages.pretrain,
        "finetune": recipe.stages.finetune,
    }
    assert tuple(of) == STAGES
    return of[stage]
