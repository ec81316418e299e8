"""The base of every settings model. A leaf: imports pydantic only."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Strict(BaseModel):
    """Frozen, and an unknown key is an error (``dpa.recipe`` adds the nearest known name)."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)
