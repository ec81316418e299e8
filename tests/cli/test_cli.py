"""The command line as a process: exit codes, messages, what goes to which stream."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dpa.testing.project import write_project

ROOT = Path(__file__).parents[2]


def call(*arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "dpa", *map(str, arguments)], capture_output=True, text=True, cwd=cwd, check=False
    )


COMMANDS: tuple[tuple[str, ...], ...] = (
    (),
    ("run",),
    ("ablate",),
    ("plan",),
    ("eval",),
    ("eval", "score"),
    ("compare",),
    ("conflict",),
    ("report",),
    ("explain",),
    ("chat",),
    ("export",),
    ("data", "check"),
    ("data", "convert"),
    ("data", "captions"),
    ("models", "smollm2"),
    ("reference",),
    ("lab", "make"),
)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: tuple[str, ...]) -> None:
    done = call(*command, "--help")
    assert done.returncode == 0
    assert not command or "Example: dpa" in done.stdout


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, dpa.cli; sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'rich', 'yaml')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "nowhere.yaml"), "no such recipe"),
        (("run", "recipe.yaml", "stages.pretrain.learning_rat=1"), "did you mean learning_rate?"),
        (("run", "recipe.yaml", "--until", "four"), "no such stage"),
        (("run", "recipe.yaml", "data.captions.path=gone.json"), "gone.json"),
        (("run", "recipe.yaml", "model.llm=./gone"), "./gone"),
        (("eval", "./gone", "--data", "."), "questions.jsonl"),
        (("eval", "score", "--benchmark", "mmvp", "--predictions", "gone.jsonl"), "gone.jsonl"),
        (("compare", "gone"), "gone"),
        (("conflict", "gone.json"), "gone.json"),
        (("eval", "./gone", "--data", ".", "--devices", "none"), "devices"),
        (("export", "./gone", "--to", "hf"), "./gone"),
        (("export", "llm", "--to", "gguf"), "choose hf, llava, peft"),
        (("report", "gone"), "gone"),
        (("explain", "gone", "picture.png"), "IMAGE and TEXT"),
        (("explain", "./gone", "--samples", "2"), "./gone is no run's folder"),
        (("explain", "./llm", "recipe.yaml", "a dog"), "no LLaVA checkpoint"),
        (("chat", "./llm"), "no LLaVA checkpoint"),
        (("chat", "./llm", "--image", "gone.png"), "gone.png"),
        (("lab", "make", "recipe.yaml"), "recipe.yaml"),
        (("models", "smollm2", "out", "--gguf", "gone.gguf"), "gone.gguf"),
        (("reference", "gone"), "gone"),
        (("nonsense",), "nonsense"),
    ],
)
def test_the_users_mistakes_end_with_2_and_one_message(
    tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    path = write_project(tmp_path / "project")
    done = call(*arguments, cwd=path.parent)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_run_prints_json_and_nothing_else(tmp_path: Path) -> None:
    path = write_project(tmp_path / "project")
    plan = json.loads(call("run", path, "method=vanilla", "--dry-run", "--json").stdout)
    assert [row["stage"] for row in plan["stages"]] == ["pretrain", "finetune"]
    done = call("run", path, "method=vanilla", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads((path.parent / "runs" / "project" / "summary.json").read_text())
    done = call("run", path, "method=vanilla")
    assert "checkpoint" in done.stdout
    assert "reused" in done.stderr


def test_every_shipped_recipe_parses() -> None:
    from dpa.ablation.grid import load_ablation
    from dpa.recipe import load_recipe, read_tree

    recipes = sorted((ROOT / "recipes").rglob("*.yaml"))
    assert len(recipes) >= 7
    for path in recipes:
        assert (load_ablation(path) if "base" in read_tree(path) else load_recipe(path)).methods


def test_the_readmes_commands_exist() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = set(re.findall(r"\bdpa (run|eval|compare|report|lab make|[a-z]+)\b(?= [A-Z/a-z-])", readme))
    known = {"run", "eval", "compare", "report", "lab make"}
    code = re.findall(r"^(?:\.venv/bin/)?dpa (\S+)", readme, flags=re.MULTILINE)
    assert set(code) <= {"run", "eval", "compare", "report", "explain", "chat", "export", "lab"}
    assert commands & known
