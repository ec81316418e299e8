"""Saved folders that transformers 4 reads as we meant them: what servers run today.

transformers 5 gave several settings new names and writes only those. transformers 4 does not know them and says
nothing: without ``rope_theta`` it takes 10,000, and a Qwen2.5 (1,000,000) or Llama-3.1 (500,000, scaled) answers with
garbage. So both spellings are written; transformers 5 reads either.

| transformers 5 writes | transformers 4 reads | without it |
|---|---|---|
| ``rope_parameters`` | ``rope_theta``, ``rope_scaling``, and others of its parts | wrong positions |
| ``dtype`` | ``torch_dtype`` (``dtype`` from 4.56 on) | loaded in float32 |
| ``tokenizer_class: TokenizersBackend`` | ``PreTrainedTokenizerFast`` | ValueError |
| ``extra_special_tokens`` as a list | ``additional_special_tokens`` | AttributeError |
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

_OF_THE_MACHINE = ("_name_or_path", "is_local", "local_files_only", "backend")
"""Paths and habits of the machine that trained; nothing reads them from a file."""


def make_portable(folder: Path) -> None:
    """Rewrites ``config.json`` and ``tokenizer_config.json`` of a saved LLaVA (or LLM) so that both versions agree."""
    _rewrite(folder / "config.json", portable_config)
    _rewrite(folder / "tokenizer_config.json", portable_tokenizer)


def portable_config(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration (of a LLaVA, its parts included, or of an LLM) in both spellings."""
    config = {name: value for name, value in config.items() if name not in _OF_THE_MACHINE}
    for part in ("text_config", "vision_config"):
        if part in config:
            config[part] = portable_config(config[part])
    if config.get("dtype") is not None:
        config["torch_dtype"] = config["dtype"]
    rope = config.get("rope_parameters")
    return config if not rope else {**config, **_old_rope(rope)}


def _old_rope(rope: dict[str, Any]) -> dict[str, Any]:
    if "full_attention" in rope:  # one set per kind of layer (Gemma-3): the local one has a base alone
        local = rope["sliding_attention"]["rope_theta"]
        return {**_old_rope(rope["full_attention"]), "rope_local_base_freq": local}
    named = ("rope_theta", "partial_rotary_factor")
    old = {name: rope[name] for name in named if name in rope}
    scaling = {name: value for name, value in rope.items() if name not in named}
    if scaling.get("rope_type", "default") != "default":
        old["rope_scaling"] = scaling
    return old


def portable_tokenizer(config: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer's configuration as both versions read it."""
    config = {name: value for name, value in config.items() if name not in _OF_THE_MACHINE}
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    return config


def _rewrite(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    if not path.is_file():
        return
    changed = change(json.loads(path.read_text(encoding="utf-8")))
    path.write_text(json.dumps(changed, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
