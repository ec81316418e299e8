"""The lab's data set on disk: pictures, captions in two languages, instructions, held-out questions.

Everything follows from the settings: the same settings give the same bytes. No scene (background and objects) of one
part occurs in another, so held-out questions are about pictures that no training file holds.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from dpa.errors import UserError
from dpa.lab.language import LANGUAGES, Language, caption
from dpa.lab.questions import Question, balanced_questions
from dpa.lab.render import render
from dpa.lab.scenes import Scene, draw_scene
from dpa.store import disk_errors

VERSION: Final = 1
"""Raise it when the same settings no longer give the same bytes."""
MANIFEST: Final = "lab.json"
PROMPT: Final = "Describe the scene."
"""The human turn of captions, after the image (LLaVA's pre-training format; the plain template drops its text)."""

_SEEDS: Final = 900_000
"""Worlds from here on belong to the shipped parts: their training and their measurements."""
_OFFSETS: Final = {"heldout": 0, "instruction": 10_000_000, "text": 20_000_000, "caption": 30_000_000}
"""Part -> first index of its scenes in the world; parts are drawn in this order, and none repeats an earlier scene."""
_FEW: Final = 64
"""Up to so many pictures, worker processes cost more than they save."""
_MARK: Final = ".dpa-lab"
"""Says that an unfinished folder is ours to remove."""

Progress = Callable[[int, int], None]
"""Called with (pictures written, all pictures)."""


@dataclass(frozen=True, slots=True)
class LabSettings:
    """What decides the bytes of a lab folder."""

    seed: int
    caption_scenes: int
    instruction_scenes: int
    """Samples of ``instructions.json``, those without image included."""
    heldout_scenes: int
    text_only_share: float
    questions_per_scene: int
    """At most: a question that would unbalance the answers is left out."""


@dataclass(frozen=True, slots=True)
class LabManifest:
    """What ``lab.json`` says about the folder ``path``."""

    path: Path
    version: int
    settings: LabSettings
    counts: dict[str, int]
    files: dict[str, str]
    """File -> sha256."""
    images: str
    """sha256 over the names and digests of all pictures."""
    reused: bool = False
    """True if the folder was there already; not written down."""

    def to_dict(self) -> dict[str, Any]:
        """The content of ``lab.json``."""
        return {
            "version": self.version,
            "settings": asdict(self.settings),
            "counts": self.counts,
            "files": self.files,
            "images": self.images,
        }

    def text(self) -> str:
        """For people."""
        counts = ", ".join(f"{number} {name.replace('_', ' ')}" for name, number in sorted(self.counts.items()))
        return f"{self.path}: {'there already' if self.reused else 'written'} ({counts})"


def make_lab(
    out: Path,
    *,
    seed: int = 0,
    caption_scenes: int = 4000,
    instruction_scenes: int = 3000,
    heldout_scenes: int = 400,
    text_only_share: float = 0.1,
    questions_per_scene: int = 4,
    progress: Progress | None = None,
) -> LabManifest:
    """Writes the lab's data set into the folder ``out``, whole or not at all; an identical one is reused.

    Files: ``images/*.png``, ``captions_a.json``, ``captions_b.json``, ``instructions.json`` (LLaVA's formats),
    ``questions.jsonl`` (held-out), ``lab.json`` (settings, counts, digests).

    Raises:
        UserError: a setting is out of range, or ``out`` holds something that is not a lab data set.
        StorageError, UserError: the disk is full or not writable; what was in ``out`` before is still there.
    """
    settings = LabSettings(
        seed=seed,
        caption_scenes=caption_scenes,
        instruction_scenes=instruction_scenes,
        heldout_scenes=heldout_scenes,
        text_only_share=text_only_share,
        questions_per_scene=questions_per_scene,
    )
    _check(settings)
    out = out.resolve()
    there = read_manifest(out)
    if there is not None and there.version == VERSION and there.settings == settings and _intact(there):
        return replace(there, reused=True)
    _refuse_foreign(out)
    partial = out.with_name(out.name + ".partial")
    with disk_errors(out):
        _begin(partial)
        manifest = _write(partial, settings, progress)
        (partial / _MARK).unlink()
        _publish(partial, out)
    return replace(manifest, path=out)


def _check(settings: LabSettings) -> None:
    if not 0 <= settings.seed < _SEEDS:
        raise UserError(f"seed is {settings.seed}; the lab's worlds are 0 to {_SEEDS - 1}")
    for name in ("caption_scenes", "instruction_scenes", "heldout_scenes", "questions_per_scene"):
        value = getattr(settings, name)
        if not 1 <= value <= 1_000_000:
            raise UserError(f"{name} is {value}; it must be 1 to 1000000")
    if not 0 <= settings.text_only_share <= 1:
        raise UserError(f"text_only_share is {settings.text_only_share}; it must be 0 to 1")


# The folder


def read_manifest(folder: Path) -> LabManifest | None:
    """What ``lab.json`` in ``folder`` says, or None where there is none that this version can read."""
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return LabManifest(
            path=folder,
            version=content["version"],
            settings=LabSettings(**content["settings"]),
            counts=content["counts"],
            files=content["files"],
            images=content["images"],
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _refuse_foreign(out: Path) -> None:
    """Only nothing, an empty folder, or a folder with the files of a lab data set may be replaced."""
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"{out} is a file; name a folder for the lab data set")
    ours = {
        MANIFEST,
        "images",
        "questions.jsonl",
        "instructions.json",
        *(f"captions_{name}.json" for name in LANGUAGES),
    }
    found = sorted(item.name for item in out.iterdir())
    foreign = [name for name in found if name not in ours]
    if found and (foreign or MANIFEST not in found):
        shown = ", ".join((foreign or found)[:3])
        raise UserError(f"{out} holds files that are not a lab data set ({shown}); name a new or empty folder")


def _intact(manifest: LabManifest) -> bool:
    """The text files are as written and no picture is missing."""
    try:
        if any(_sha256((manifest.path / name).read_bytes()) != digest for name, digest in manifest.files.items()):
            return False
        return len(list((manifest.path / "images").iterdir())) == manifest.counts["images"]
    except OSError:
        return False


def _begin(partial: Path) -> None:
    if partial.exists():
        if not partial.is_dir() or (any(partial.iterdir()) and not (partial / _MARK).exists()):
            raise UserError(f"{partial} is in the way: the data set is put together there; move it away")
        shutil.rmtree(partial)
    (partial / "images").mkdir(parents=True)
    (partial / _MARK).touch()


def _publish(partial: Path, out: Path) -> None:
    """``partial`` becomes ``out``; a lab data set that was there goes away last."""
    old = out.with_name(out.name + ".old")
    if out.exists() and any(out.iterdir()):
        shutil.rmtree(old, ignore_errors=True)
        os.replace(out, old)
    os.replace(partial, out)
    shutil.rmtree(old, ignore_errors=True)


# The content


@dataclass(frozen=True, slots=True)
class _Parts:
    """The scenes of each part, ``key`` = name of the picture."""

    heldout: tuple[Scene, ...]
    instruction: tuple[Scene, ...]
    text: tuple[Scene, ...]
    caption: tuple[Scene, ...]

    def pictures(self) -> Iterator[tuple[str, Scene]]:
        """Path of each picture in the folder, and its scene."""
        for part, scenes in (("heldout", self.heldout), ("instruction", self.instruction), ("caption", self.caption)):
            for index, scene in enumerate(scenes):
                yield _picture(part, index), scene


def _picture(part: str, index: int) -> str:
    return f"images/{part}-{index:06d}.png"


def _draw(settings: LabSettings) -> _Parts:
    without_image = round(settings.instruction_scenes * settings.text_only_share)
    wanted = {
        "heldout": settings.heldout_scenes,
        "instruction": settings.instruction_scenes - without_image,
        "text": without_image,
        "caption": settings.caption_scenes,
    }
    earlier: set[tuple[object, ...]] = set()
    parts: dict[str, tuple[Scene, ...]] = {}
    for part, offset in _OFFSETS.items():
        drawn: list[Scene] = []
        index = offset
        while len(drawn) < wanted[part]:
            scene = draw_scene(settings.seed, index)
            index += 1
            if (scene.background, scene.things) not in earlier:
                drawn.append(scene)
        earlier |= {(scene.background, scene.things) for scene in drawn}
        parts[part] = tuple(drawn)
    return _Parts(**parts)


def _captions(scenes: Sequence[Scene], language: Language, settings: LabSettings) -> list[dict[str, Any]]:
    rng = random.Random(f"captions:{settings.seed}:{language}")
    records = []
    for index, scene in enumerate(scenes):
        said = caption(scene, language, rng)
        records.append(
            {
                "id": f"caption-{index:06d}",
                "image": _picture("caption", index),
                "conversations": [
                    {"from": "human", "value": f"<image>\n{PROMPT}"},
                    {"from": "gpt", "value": said.text},
                ],
                "visual_spans": [list(span) for span in said.visual_spans],
            }
        )
    return records


def _by_scene(scenes: Sequence[Scene], settings: LabSettings, part: str) -> Iterator[tuple[int, Scene, list[Question]]]:
    """Index, scene and its questions; a scene that balance left without any is skipped."""
    # A world of its own for every part, so that the questions of one do not depend on the size of another.
    seed = settings.seed * len(_OFFSETS) + list(_OFFSETS).index(part)
    questions: dict[str, list[Question]] = {scene.key: [] for scene in scenes}
    for scene, question in balanced_questions(scenes, settings.questions_per_scene, seed):
        questions[scene.key].append(question)
    for index, scene in enumerate(scenes):
        if questions[scene.key]:
            yield index, scene, questions[scene.key]


def _conversation(opening: str, questions: Sequence[Question]) -> list[dict[str, str]]:
    turns = []
    for question in questions:
        turns.append({"from": "human", "value": opening + question.text})
        turns.append({"from": "gpt", "value": question.answer})
        opening = ""
    return turns


def _instructions(parts: _Parts, settings: LabSettings) -> list[dict[str, Any]]:
    """Questions about pictures, and some about descriptions in A, in a random order."""
    rng = random.Random(f"instructions:{settings.seed}")
    records: list[dict[str, Any]] = []
    for index, _, questions in _by_scene(parts.instruction, settings, "instruction"):
        records.append(
            {
                "id": f"instruction-{index:06d}",
                "image": _picture("instruction", index),
                "conversations": _conversation("<image>\n", questions),
            }
        )
    for index, scene, questions in _by_scene(parts.text, settings, "text"):
        description = caption(scene, "a", rng).text
        records.append({"id": f"text-{index:06d}", "conversations": _conversation(f"{description}\n", questions)})
    rng.shuffle(records)
    return records


def _questions(scenes: Sequence[Scene], settings: LabSettings) -> list[dict[str, Any]]:
    records = []
    for index, scene, questions in _by_scene(scenes, settings, "heldout"):
        for number, question in enumerate(questions):
            records.append(
                {
                    "id": f"heldout-{index:06d}-{number}",
                    "scene": scene.key,
                    "image": _picture("heldout", index),
                    "question": question.text,
                    "answer": question.answer,
                    "kind": question.kind,
                    "form": question.form,
                    "choices": list(question.choices),
                }
            )
    return records


def _write(folder: Path, settings: LabSettings, progress: Progress | None) -> LabManifest:
    parts = _draw(settings)
    digests = _write_images(folder, list(parts.pictures()), progress)
    instructions = _instructions(parts, settings)
    questions = _questions(parts.heldout, settings)
    contents = {f"captions_{name}.json": _json_list(_captions(parts.caption, name, settings)) for name in ("a", "b")}
    contents["instructions.json"] = _json_list(instructions)
    contents["questions.jsonl"] = "".join(_json(record) + "\n" for record in questions)
    for name, text in contents.items():
        (folder / name).write_bytes(text.encode())
    manifest = LabManifest(
        path=folder,
        version=VERSION,
        settings=settings,
        counts={
            "captions": len(parts.caption),
            "instructions": len(instructions),
            "instructions_without_image": sum("image" not in record for record in instructions),
            "instruction_questions": sum(len(record["conversations"]) // 2 for record in instructions),
            "heldout_questions": len(questions),
            "images": len(digests),
        },
        files={name: _sha256(text.encode()) for name, text in sorted(contents.items())},
        images=_sha256("".join(f"{name} {digest}\n" for name, digest in sorted(digests.items())).encode()),
    )
    (folder / MANIFEST).write_bytes((json.dumps(manifest.to_dict(), indent=2, sort_keys=True) + "\n").encode())
    return manifest


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _json_list(records: Sequence[Any]) -> str:
    """A JSON list, a record a line, so that files can be looked at and compared."""
    return "[\n" + ",\n".join(_json(record) for record in records) + "\n]\n"


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


# Pictures


def _write_image(job: tuple[str, Scene]) -> str:
    """Renders one picture into the file ``job[0]``; returns its digest. Runs in worker processes."""
    path, scene = job
    # Everything that Pillow lets one choose is chosen: bytes must not depend on its defaults.
    with open(path, "w+b") as file:
        render(scene).save(file, format="PNG", optimize=False, compress_level=1)
        file.seek(0)
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_images(folder: Path, pictures: list[tuple[str, Scene]], progress: Progress | None) -> dict[str, str]:
    """Writes all pictures on all cores; returns name -> digest."""
    jobs = [(str(folder / name), scene) for name, scene in pictures]
    workers = os.cpu_count() or 1
    if workers == 1 or len(jobs) <= _FEW:
        return _collect(pictures, map(_write_image, jobs), progress)
    try:
        with ProcessPoolExecutor(workers) as pool:
            return _collect(pictures, pool.map(_write_image, jobs, chunksize=32), progress)
    except (BrokenProcessPool, PermissionError, NotImplementedError):
        # No processes here (a sandbox, or a script without a main guard where processes are spawned): one at a time.
        return _collect(pictures, map(_write_image, jobs), progress)


def _collect(pictures: list[tuple[str, Scene]], digests: Iterator[str], progress: Progress | None) -> dict[str, str]:
    result: dict[str, str] = {}
    for (name, _), digest in zip(pictures, digests, strict=True):
        result[name] = digest
        if progress is not None:
            progress(len(result), len(pictures))
    return result
