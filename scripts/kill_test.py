"""Kills a whole run at random moments until it is through, and compares it with one that nobody disturbed.

    python scripts/kill_test.py RECIPE [key=value ...] [--kills 20] [--seed 0] [--work DIR]

Both runs have stores of their own. Compared: digests of all weights (checkpoint, connector, proxy) and every line of
the metrics but its times. Exit code 0: equal; 1: not.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TIMES = {"seconds", "data_wait_share", "tokens_per_second"}
WEIGHTS = ("checkpoint/model.safetensors", "connector/mm_projector.bin", "proxy/adapter_model.safetensors")


def start(recipe: str, overrides: list[str], work: Path) -> subprocess.Popen[bytes]:
    """``dpa run`` in a process group of its own, its messages in ``work/log.txt``."""
    command = [sys.executable, "-m", "dpa", "run", recipe, *overrides, f"output={work}/runs", f"store={work}/store"]
    work.mkdir(parents=True, exist_ok=True)
    with open(work / "log.txt", "ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)


def finish(process: subprocess.Popen[bytes], work: Path) -> None:
    """Waits for a run that must succeed."""
    if process.wait() != 0:
        raise SystemExit(f"the run failed; the end of {work / 'log.txt'}:\n{(work / 'log.txt').read_text()[-2000:]}")


def kill_until_done(recipe: str, overrides: list[str], work: Path, kills: int, longest: float, seed: int) -> int:
    """Starts the same command again and again; every start but the last is killed. Returns the number of kills."""
    draw, done = random.Random(seed), 0
    while done < kills:
        process = start(recipe, overrides, work)
        moment = draw.uniform(0.1, longest)
        try:
            process.wait(timeout=moment)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            done += 1
            print(f"kill {done:2} after {moment:5.1f} s: {progress(work)}", flush=True)
            continue
        finish(process, work)
        break  # it got through between two kills
    finish(start(recipe, overrides, work), work)
    return done


def progress(work: Path) -> str:
    """What is finished and what is in the making."""
    store = work / "store"
    names = sorted(item.name.split("-")[0] for item in store.glob("*-*") if (item / "manifest.json").is_file())
    partial = [item.name.split("-")[0] for item in store.glob("*.partial")]
    return f"finished: {', '.join(names) or 'nothing'}; in the making: {', '.join(partial) or 'nothing'}"


def contents(work: Path) -> dict[str, str]:
    """Name -> digest of everything that must be equal."""
    found = {}
    for run in sorted((work / "runs").iterdir()):
        if not (run / "recipe.yaml").is_file():
            continue
        for folder in (run, *sorted(item for item in run.iterdir() if (item / "checkpoint").exists())):
            for name in WEIGHTS:
                if (folder / name).is_file():
                    key = os.path.relpath(folder / name, work / "runs")
                    found[key] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
            lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
            kept = [{key: value for key, value in line.items() if key not in TIMES} for line in lines]
            key = os.path.relpath(folder / "metrics.jsonl", work / "runs") + f" ({len(kept)} lines, without times)"
            found[key] = hashlib.sha256(json.dumps(kept).encode()).hexdigest()
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, help="folder for both runs; default: a temporary one, removed at the end")
    given = parser.parse_args()
    work = given.work or Path(tempfile.mkdtemp(prefix="dpa-kill-"))
    began = time.monotonic()
    finish(start(given.recipe, given.overrides, work / "whole"), work / "whole")
    seconds = time.monotonic() - began
    print(f"undisturbed: {seconds:.0f} s")
    # Short enough that the given number of kills hits the run before it is through.
    longest = max(8.0, 2.5 * seconds / given.kills)
    kills = kill_until_done(given.recipe, given.overrides, work / "killed", given.kills, longest, given.seed)
    whole, killed = contents(work / "whole"), contents(work / "killed")
    for name in sorted(whole | killed):
        same = whole.get(name) == killed.get(name)
        print(f"{'equal' if same else 'DIFFERENT':9} {whole.get(name, '-')[:16]} {killed.get(name, '-')[:16]} {name}")
    print(f"{kills} kills; {'everything is equal' if whole == killed else 'NOT EQUAL'}")
    if given.work is None:
        shutil.rmtree(work)
    return 0 if whole == killed else 1


if __name__ == "__main__":
    raise SystemExit(main())
