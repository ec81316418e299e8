"""The import graph of docs/architecture.md: any other arrow fails."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "dpa"
LEAVES = {"errors", "launch", "log", "settings", "types"}
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "launch": {"errors"},
    "log": set(),
    "settings": set(),
    "types": set(),
    "store": {"errors"},
    "objectives": LEAVES,
    "models": LEAVES | {"objectives", "lab"},  # lab: the shipped parts' folder, by lab_asset alone
    "data": LEAVES | {"objectives", "store"},
    "train": LEAVES | {"objectives", "models", "data", "store"},
    "lab": LEAVES | {"objectives", "models", "data", "store"},
    "evaluate": LEAVES | {"objectives", "models", "data", "store"},
    # analyze and train: the proxy of dpa conflict is a brief stage 1
    "analyze": LEAVES | {"objectives", "models", "data", "train", "evaluate", "store"},
    "export": LEAVES | {"objectives", "models", "data", "store"},
    "recipe": LEAVES | {"data", "models", "train", "evaluate"},
    "results": LEAVES | {"recipe", "store"},
    "pipeline": LEAVES
    | {"recipe", "results", "store", "train", "data", "models", "objectives", "evaluate", "analyze", "lab"},
    "ablation": LEAVES | {"recipe", "store", "pipeline", "analyze", "results"},
    "plan": LEAVES | {"recipe", "pipeline", "train", "data", "models", "objectives"},
    "cli": LEAVES
    | {"ablation", "recipe", "results", "pipeline", "plan", "evaluate", "analyze", "lab", "data", "export", "models"},
    "testing": LEAVES | {"objectives", "models", "data", "train", "lab"},
    "__main__": {"cli"},
    "__init__": {"analyze", "models", "objectives", "pipeline", "recipe"},
}
FILES = sorted(SOURCE.rglob("*.py"))


def room_of(path: Path) -> str:
    first = path.relative_to(SOURCE).parts[0]
    return first.removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        rooms |= {name.split(".")[1] for name in names if name.startswith("dpa.")}
    return rooms


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_arrows(path: Path) -> None:
    room = room_of(path)
    assert room in ALLOWED, f"{room}: a new room needs its row in docs/architecture.md and here"
    foreign = {name for name in imported_rooms(path) if name != room} - ALLOWED[room]
    assert not foreign, f"{path.relative_to(SOURCE)} imports {sorted(foreign)}"


def test_scoring_imports_the_errors_alone() -> None:
    for path in (SOURCE / "evaluate" / "scoring").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                name = node.module or "" if isinstance(node, ast.ImportFrom) else node.names[0].name
                allowed = name == "dpa.errors" or name.startswith("dpa.evaluate.scoring")
                assert allowed or name.split(".")[0] in sys.stdlib_module_names, f"{path}:{node.lineno}: {name}"


@pytest.mark.parametrize("room", ["data", "models", "train", "evaluate", "analyze"])
def test_rooms_with_settings_import_nothing_by_themselves(room: str) -> None:
    assert imported_rooms(SOURCE / room / "__init__.py") == set()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_size(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 450, "split the file (house rule: about 400 lines)"
