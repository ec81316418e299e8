"""benchmarks/index.py keeps its promises on a small file: JSON, the cases asked for, memory of each by itself."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "index.py"


def test_command(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--samples", "300", "--cases", "index", "sample", "--folder", str(tmp_path)]
    done = subprocess.run([*command, "--json"], check=True, capture_output=True, text=True)
    result: dict[str, Any] = json.loads(done.stdout)
    assert result["samples"] == result["cases"]["index"]["samples"] == 300
    assert result["cases"]["sample"]["samples_per_second"] > 0
    for case in result["cases"].values():
        assert 0 < case["private_mb"] < case["with_file_pages_mb"]
        assert case["cpu_seconds"] > 0
