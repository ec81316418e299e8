"""Teach the lab's LLM to say in B what it read in A: ``python -m dpa.lab.pretrain_twins --llm DIR --out DIR``.

A frozen LLM can only show through its captions what it can express. The LLM of :mod:`dpa.lab.pretrain_llm` knows how B
sounds, but B's visual words after a caption in A of the same scene are no easier for it than without (2.6 nats against
2.7): whatever a connector wrote into its context, captions in B would not profit, and there would be nothing to learn
from them. Real LLMs know many registers and what their words mean.

So it continues on documents that describe a scene twice, the second time in B. Trained are B's *visual* words alone. At
its *linguistic* words the distribution is held to that of the LLM as it came (KL divergence to the frozen copy): how
unusual B's manner is for it, and with it the conflict that the study measures, stays what it was.

Legend: B sequences, L tokens of a sequence, N supervised tokens, K tokens held to the teacher, V vocabulary.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
from torch.nn import functional
from torch.utils.data import DataLoader, IterableDataset
from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

from dpa.lab import pretrain_llm
from dpa.lab.language import Caption, caption
from dpa.lab.pretrain_llm import curriculum, save
from dpa.lab.pretrain_text import Encoder, Mixture, Sequence, Stream, words_of
from dpa.lab.text_eval import measure, question_accuracy

HELD: Final = -1.0
"""Loss weight that marks a token as held to the teacher."""


@dataclass(frozen=True, slots=True)
class Settings:
    """All that decides the result, with the LLM that it starts from."""

    steps: int = 800
    batch: int = 24
    length: int = 200
    """Tokens per sequence: two captions of most scenes."""
    share: float = 0.6
    """Share of B among plain documents; the others are the first training's."""
    learning_rate: float = 1e-3
    warmup: int = 30
    weight_decay: float = 0.05
    clip: float = 1.0
    held: float = 0.3
    """Weight of the divergence from the teacher."""
    seed: int = 77


def mixture() -> Mixture:
    """The end of the first training, with more plain documents and some B as context of questions."""
    late = curriculum(4000, pretrain_llm.Settings())
    return replace(late, captions=0.5, raw_b=0.1)


class TwinStream(Stream):
    """The first training's stream; of its plain documents :attr:`Settings.share` end with a caption in B."""

    def __init__(self, encoder: Encoder, settings: Settings) -> None:
        super().__init__(encoder, settings.seed, settings.batch, settings.length)
        self._share = settings.share

    def _captions(self, sequence: Sequence, index: int, mixture: Mixture, rng: random.Random) -> None:
        """Documents: [a caption in A or B,] the same scene in B; or the first training's twins, a quarter after B."""
        encoder = self._encoder
        while len(sequence.ids) < self._length:
            scene = self._scene(index, mixture, rng)
            first = rng.random()
            if rng.random() < self._share:
                if first < 0.7:
                    self._add_a(sequence, caption(scene, "a", rng), mixture)
                elif first < 0.9:
                    self._add_b(sequence, caption(scene, "b", rng), learned=False)
                self._add_b(sequence, caption(scene, "b", rng), learned=True)
                sequence.add([encoder.end_of_text], 0.0)
            else:
                if first < 0.25 * mixture.twins:
                    self._add_b(sequence, caption(scene, "b", rng), learned=False)
                elif first < mixture.twins:
                    self._add_a(sequence, caption(scene, "a", rng), mixture)
                self._add_a(sequence, caption(scene, "a", rng), mixture)
                sequence.add([encoder.end_of_text], mixture.caption_weight)

    def _add_a(self, sequence: Sequence, written: Caption, mixture: Mixture) -> None:
        sequence.add([*self._encoder.words(written.text), self._encoder.newline], mixture.caption_weight)

    def _add_b(self, sequence: Sequence, written: Caption, *, learned: bool) -> None:
        """Visual words are learned, linguistic ones held to the teacher; as context alone, neither."""
        for word, start, end in words_of(written.text):
            visual = any(start < last and first < end for first, last in written.visual_spans)
            sequence.add(self._encoder.words(word), (1.0 if visual else HELD) if learned else 0.0)
        sequence.add([self._encoder.newline], HELD if learned else 0.0)


class _Batches(IterableDataset[tuple[torch.Tensor, torch.Tensor]]):
    def __init__(self, tokenizer: PreTrainedTokenizerFast, settings: Settings) -> None:
        self._tokenizer = tokenizer
        self._settings = settings

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        stream, mixed = TwinStream(Encoder(self._tokenizer), self._settings), mixture()
        for step in range(self._settings.steps):
            yield stream.batch(step, mixed)


def losses(
    model: Qwen2ForCausalLM, teacher: Qwen2ForCausalLM, ids_BL: torch.Tensor, weights_BL: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What is learned and what is held.

    Args:
        ids_BL: int64 [B, L].
        weights_BL: float32 [B, L]: loss weight of each token; 0: neither; :data:`HELD`.

    Returns:
        Weighted mean of the next-token losses; mean KL(teacher || model) of the distributions at held tokens. Nats.
    """
    weights, ids = weights_BL[:, 1:], ids_BL[:, 1:]
    hidden_BLH = model.model(input_ids=ids_BL, use_cache=False).last_hidden_state[:, :-1]
    learned, held = weights > 0, weights == HELD
    losses_N = functional.cross_entropy(model.lm_head(hidden_BLH[learned]).float(), ids[learned], reduction="none")
    loss = (losses_N * weights[learned]).sum() / weights[learned].sum()
    if not held.any():
        return loss, torch.zeros(())
    rows = held.any(1)  # most sequences hold nothing to the teacher
    with torch.no_grad():
        before = teacher.model(input_ids=ids_BL[rows], use_cache=False).last_hidden_state[:, :-1][held[rows]]
        target_KV = functional.log_softmax(teacher.lm_head(before).float(), -1)
    found_KV = functional.log_softmax(model.lm_head(hidden_BLH[held]).float(), -1)
    return loss, functional.kl_div(found_KV, target_KV, log_target=True, reduction="batchmean")


def learning_rate(step: int, settings: Settings) -> float:
    """Linear warm-up, then linearly to nothing."""
    return settings.learning_rate * min(1.0, (step + 1) / settings.warmup) * (1 - step / settings.steps)


def train(llm: Path, out: Path, settings: Settings, *, log: Path | None, every: int) -> Qwen2ForCausalLM:
    """The whole run; writes the folder ``out`` at its end. Returns the model (float32)."""
    tell = pretrain_llm.Log(log)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(llm)
    model, teacher = (
        Qwen2ForCausalLM.from_pretrained(llm, dtype=torch.float32, attn_implementation="eager") for _ in range(2)
    )
    teacher.requires_grad_(False)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=settings.learning_rate,
        betas=(0.9, 0.98),
        weight_decay=settings.weight_decay,
        fused=True,
    )
    loader = DataLoader(_Batches(tokenizer, settings), batch_size=None, num_workers=1, prefetch_factor=8)
    began, learned, moved = time.monotonic(), 0.0, 0.0
    tell(settings=asdict(settings))
    for step, (ids_BL, weights_BL) in enumerate(loader):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, settings)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss, apart = losses(model, teacher, ids_BL, weights_BL)
        torch.autograd.backward(loss + settings.held * apart)
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        optimizer.step()
        optimizer.zero_grad()
        learned += float(loss.detach()) / every
        moved += float(apart.detach()) / every
        if (step + 1) % every == 0:
            accuracy = question_accuracy(model, tokenizer, scenes=150, per_scene=4)
            tell(step=step + 1, loss=learned, divergence=moved, seconds=time.monotonic() - began, **accuracy)
            learned = moved = 0.0
    _finish(model, tokenizer, llm, out, settings, time.monotonic() - began, tell)
    return model


def _finish(
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    llm: Path,
    out: Path,
    settings: Settings,
    seconds: float,
    tell: pretrain_llm.Log,
) -> None:
    """Measure what will be shipped, that is the weights rounded to bf16, and write it beside the first training's."""
    rounded = Qwen2ForCausalLM(model.config)
    rounded.load_state_dict({name: value.to(torch.bfloat16) for name, value in model.state_dict().items()})
    before: dict[str, Any] = json.loads((llm / "measurements.json").read_text())
    measurements = {
        "final": True,
        "parameters": model.num_parameters(),
        "training_seconds": before["training_seconds"] + round(seconds),
        "threads": torch.get_num_threads(),
        "settings": before["settings"],
        "twins": asdict(settings),
        **measure(rounded, tokenizer),
    }
    save(model, tokenizer, measurements, out)
    tell(**measurements)


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m dpa.lab.pretrain_twins", description=str(__doc__).split("\n")[0])
    parser.add_argument("--llm", type=Path, required=True, help="folder that dpa.lab.pretrain_llm wrote")
    parser.add_argument("--out", type=Path, default=pretrain_llm.ASSETS, help="Hugging Face folder to write")
    parser.add_argument("--log", type=Path, default=None, help="JSONL file to append to")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--every", type=int, default=100)
    for name, default in asdict(Settings()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    values = vars(parser.parse_args(arguments))
    torch.set_num_threads(values["threads"])
    settings = Settings(**{name: values[name] for name in asdict(Settings())})
    train(values["llm"], values["out"], settings, log=values["log"], every=values["every"])


if __name__ == "__main__":
    main()
