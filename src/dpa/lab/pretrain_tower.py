"""Make the lab's vision tower from nothing: ``python -m dpa.lab.pretrain_tower --out DIR``.

A stock CLIP vision transformer of about a million parameters, trained on lab scenes to say for every patch what its
cell holds. The linear heads read the *penultimate* hidden state, because that is what LLaVA hands to its connector; the
last layer serves CLS alone, which says count and background. Usable weights are written to ``--out`` on the way; with
``--state`` a run that was stopped continues.

Legend: S scenes, B scenes of a batch, P patches of an image, H hidden size, A attributes, R image side in pixels.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

from dpa.errors import UserError
from dpa.lab.render import IMAGE_SIDE, render
from dpa.lab.scenes import BACKGROUNDS, GRID, draw_scene
from dpa.lab.tower_eval import ATTRIBUTES, NO_LABEL, labels_of, measure

ASSETS = Path(__file__).parent / "assets" / "tower"

_WORLD = 950_000
"""Seed of the training scenes; data sets of the lab use seeds below 900,000, probes others."""
_CELLS = GRID * GRID
_WEIGHTS = {"row": 0.2, "column": 0.2, "background": 0.2}
"""Loss weights of the easy attributes; the others count fully."""
_CLS_WEIGHT = 0.2


@dataclass(frozen=True, slots=True)
class Settings:
    """All that decides the result."""

    scenes: int = 48_000
    steps: int = 1_000
    schedule: int = 6_000
    """Steps after which the learning rate would be zero. Every probe is past its target at 1,000."""
    batch: int = 128
    hidden: int = 128
    layers: int = 5
    heads: int = 4
    intermediate: int = 512
    patch: int = 16
    learning_rate: float = 1e-3
    warmup: int = 300
    weight_decay: float = 0.05
    clip: float = 1.0
    seed: int = 0

    @property
    def patches(self) -> int:
        """Patches of an image."""
        return (IMAGE_SIDE // self.patch) ** 2


def _pixels(seed: int, index: int) -> np.ndarray[Any, Any]:
    """One training picture. Up to nine objects: more to learn from than the data sets' five."""
    return np.asarray(render(draw_scene(seed, index, maximum=_CELLS)))


def make_data(settings: Settings, workers: int) -> tuple[Tensor, Tensor]:
    """Pictures uint8 ``[S, R, R, 3]`` and patch labels int8 ``[S, P, A]``."""
    pixels = np.empty((settings.scenes, IMAGE_SIDE, IMAGE_SIDE, 3), dtype=np.uint8)
    draw = partial(_pixels, _WORLD + settings.seed)
    with ProcessPoolExecutor(workers) as pool:
        for index, picture in enumerate(pool.map(draw, range(settings.scenes), chunksize=500)):
            pixels[index] = picture
    scenes = (draw_scene(_WORLD + settings.seed, index, maximum=_CELLS) for index in range(settings.scenes))
    labels = torch.cat([labels_of([scene], settings.patches).to(torch.int8) for scene in scenes])
    return torch.from_numpy(pixels), labels


class TowerWithHeads(nn.Module):
    """The tower and the linear heads that are thrown away afterwards."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        config = CLIPVisionConfig(
            hidden_size=settings.hidden,
            intermediate_size=settings.intermediate,
            num_hidden_layers=settings.layers,
            num_attention_heads=settings.heads,
            image_size=IMAGE_SIDE,
            patch_size=settings.patch,
            projection_dim=settings.hidden,
        )
        config._attn_implementation = "sdpa"
        self.tower = CLIPVisionModel(config)
        self.patch_head = nn.Linear(settings.hidden, sum(ATTRIBUTES.values()))
        self.count_head = nn.Linear(settings.hidden, _CELLS)
        self.background_head = nn.Linear(settings.hidden, len(BACKGROUNDS))

    def forward(self, pixels_BCRR: Tensor, labels_BPA: Tensor) -> tuple[Tensor, dict[str, float]]:
        """The loss, a weighted mean over attributes, and the accuracy of each head on this batch."""
        output = self.tower(pixel_values=pixels_BCRR, output_hidden_states=True)
        scores = self.patch_head(output.hidden_states[-2][:, 1:]).flatten(0, 1).split(list(ATTRIBUTES.values()), -1)
        loss = torch.zeros(())
        accuracy: dict[str, float] = {}
        for index, (name, logits) in enumerate(zip(ATTRIBUTES, scores, strict=True)):
            labels = labels_BPA[..., index].flatten().long()
            loss = loss + _WEIGHTS.get(name, 1.0) * functional.cross_entropy(logits, labels, ignore_index=NO_LABEL)
            known = labels != NO_LABEL
            accuracy[name] = float((logits.detach().argmax(-1) == labels)[known].float().mean())
        occupied = list(ATTRIBUTES).index("occupied")
        # Every cell has the same number of patches and every scene an object, so counts start at one.
        count = labels_BPA[..., occupied].long().sum(-1) * _CELLS // labels_BPA.shape[1] - 1
        count_logits = self.count_head(output.pooler_output)
        accuracy["count (CLS)"] = float((count_logits.detach().argmax(-1) == count).float().mean())
        background = labels_BPA[:, 0, list(ATTRIBUTES).index("background")].long()
        cls_loss = functional.cross_entropy(count_logits, count)
        cls_loss = cls_loss + functional.cross_entropy(self.background_head(output.pooler_output), background)
        return loss + _CLS_WEIGHT * cls_loss, accuracy


def make_processor() -> CLIPImageProcessorPil:
    """CLIP's own preprocessing at the lab's size; pictures of the lab pass through with their pixels unchanged."""
    return CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIDE}, crop_size={"height": IMAGE_SIDE, "width": IMAGE_SIDE}
    )


def normalise(pixels_BRR3: Tensor, processor: CLIPImageProcessorPil) -> Tensor:
    """What the processor does to a picture of the right size, for a whole batch: float32 ``[B, 3, R, R]``."""
    mean, std = torch.tensor(processor.image_mean), torch.tensor(processor.image_std)
    return ((pixels_BRR3.float() / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()


@torch.no_grad()
def rescale(tower: CLIPVisionModel, factor: float) -> None:
    """Multiplies the residual stream by ``factor`` and changes nothing else.

    Layer norms stand before every block, so only what is *written* to the stream has a scale: the first layer norm and
    the two output projections of each layer. (Exact but for the layer norms' epsilon.)
    """
    written: list[nn.Module] = [tower.pre_layrnorm]
    for layer in tower.encoder.layers:
        assert isinstance(layer, CLIPEncoderLayer)
        written += [layer.self_attn.out_proj, layer.mlp.fc2]
    for module in written:
        for parameter in module.parameters():
            parameter.mul_(factor)


def learning_rate(step: int, settings: Settings) -> float:
    """Linear warm-up, then a cosine over the schedule."""
    if step < settings.warmup:
        return settings.learning_rate * (step + 1) / settings.warmup
    progress = (step - settings.warmup) / max(1, settings.schedule - settings.warmup)
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def save(tower: CLIPVisionModel, out: Path, facts: dict[str, Any], scenes: tuple[int, int]) -> dict[str, Any]:
    """Writes a copy with features of root mean square 1, processor and measurements; replaces ``out`` in one rename."""
    processor = make_processor()
    copy = CLIPVisionModel(tower.config)
    copy.load_state_dict(tower.state_dict())
    rescale(copy, 1 / measure(copy, processor, scenes=(50, 200))["feature_rms"])
    result = {**measure(copy, processor, scenes=scenes), **facts}
    fresh = out.with_name(f".{out.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    copy.save_pretrained(fresh)
    processor.save_pretrained(fresh)
    (fresh / "model.safetensors").chmod(0o644)  # safetensors makes it readable for its owner only
    (fresh / "measurements.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if out.exists():
        old = out.with_name(f".{out.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        os.replace(out, old)
        os.replace(fresh, out)
        shutil.rmtree(old)
    else:
        os.replace(fresh, out)
    return result


class Run:
    """A training under way: model, optimizer and place in the data, which it can save and continue from."""

    def __init__(self, settings: Settings, state: Path | None) -> None:
        self.settings = settings
        self.step = 0
        self.seconds = 0.0
        self._state = state
        torch.manual_seed(settings.seed)
        self.model = TowerWithHeads(settings)
        decayed = [parameter for parameter in self.model.parameters() if parameter.ndim > 1]
        others = [parameter for parameter in self.model.parameters() if parameter.ndim <= 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}],
            lr=settings.learning_rate,
            betas=(0.9, 0.98),
        )
        self._order = torch.empty(0, dtype=torch.long)
        if state is not None and state.exists():
            self._load(torch.load(state, weights_only=True))

    def _load(self, saved: dict[str, Any]) -> None:
        if saved["settings"] != asdict(self.settings):
            raise UserError(f"{self._state} belongs to other settings ({saved['settings']}); remove it to start anew")
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.step, self.seconds, self._order = saved["step"], saved["seconds"], saved["order"]
        torch.set_rng_state(saved["generator"])

    def save(self) -> None:
        """Writes the state, if there is a place for it."""
        if self._state is None:
            return
        saved = {
            "settings": asdict(self.settings),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "order": self._order,
            "generator": torch.get_rng_state(),
        }
        temporary = self._state.with_name(self._state.name + ".tmp")
        torch.save(saved, temporary)
        os.replace(temporary, self._state)

    def advance(
        self, pixels_SRR3: Tensor, labels_SPA: Tensor, processor: CLIPImageProcessorPil
    ) -> tuple[float, dict[str, float]]:
        """One step; returns its loss and accuracies."""
        settings = self.settings
        if len(self._order) < settings.batch:
            self._order = torch.cat([self._order, torch.randperm(settings.scenes)])
        chosen, self._order = self._order[: settings.batch], self._order[settings.batch :].clone()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, settings)
        loss, accuracy = self.model(normalise(pixels_SRR3[chosen], processor), labels_SPA[chosen])
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip)
        self.optimizer.step()
        self.step += 1
        return float(loss.detach()), accuracy


def train(settings: Settings, out: Path, *, workers: int, save_every: int, state: Path | None) -> dict[str, Any]:
    """Renders, trains, saves; returns the measurements that were written.

    Raises:
        UserError: ``state`` belongs to other settings.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    run = Run(settings, state)
    processor = make_processor()
    started = time.monotonic() - run.seconds
    pixels_SRR3, labels_SPA = make_data(settings, workers)
    print(f"{settings.scenes} scenes rendered; {time.monotonic() - started:.0f} s", flush=True)
    while run.step < settings.steps:
        loss, accuracy = run.advance(pixels_SRR3, labels_SPA, processor)
        run.seconds = time.monotonic() - started
        if run.step % 50 == 0:
            shown = " ".join(f"{name} {value:.3f}" for name, value in accuracy.items())
            print(f"step {run.step} loss {loss:.3f} {shown} {run.seconds:.0f} s", flush=True)
            run.save()
        if run.step % save_every == 0 and run.step < settings.steps:
            print(json.dumps(save(run.model.tower, out, _facts(run), (1000, 500))), flush=True)
    return save(run.model.tower, out, _facts(run), (3000, 1500))


def _facts(run: Run) -> dict[str, Any]:
    return {
        "steps": run.step,
        "finished": run.step == run.settings.steps,
        "seconds": round(run.seconds),
        "threads": torch.get_num_threads(),
        "settings": asdict(run.settings),
    }


def main() -> None:
    """Command line; defaults make the shipped tower."""
    defaults = Settings()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=ASSETS)
    parser.add_argument("--state", type=Path, help="file to save the run in every 50 steps, and to continue from")
    parser.add_argument("--steps", type=int, default=defaults.steps)
    parser.add_argument("--schedule", type=int, default=defaults.schedule)
    parser.add_argument("--scenes", type=int, default=defaults.scenes)
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--save-every", type=int, default=500)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    settings = Settings(
        steps=arguments.steps, schedule=arguments.schedule, scenes=arguments.scenes, seed=arguments.seed
    )
    result = train(
        settings, arguments.out, workers=arguments.threads, save_every=arguments.save_every, state=arguments.state
    )
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
