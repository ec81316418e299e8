"""Starts an outside harness in a process of its own and reads what it says."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dpa.errors import DpaError, UserError
from dpa.evaluate.harness.door import HarnessResult, Metric, Request
from dpa.evaluate.harness.tasks import PAPER, task_requests
from dpa.evaluate.predictions import folder_for
from dpa.store import disk_errors, write_json

HARNESSES = ("dpa", "lmms-eval")
HarnessProgress = Callable[[str], Callable[[int, int], None]]
"""From a benchmark's name, once, to what is called with (questions answered, all questions)."""

_INSTALL = "pip install lmms-eval==0.7.3 (in a checkout: pip install -e '.[lmms]'; docs/evaluation.md, Other harnesses)"
_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
_TAIL = 12


def evaluate_with_lmms_eval(
    checkpoint: str,
    *,
    benchmarks: Sequence[str],
    data: Path | None,
    out: Path | None = None,
    limit: int | None = None,
    batch_size: int = 64,
    progress: HarnessProgress | None = None,
) -> HarnessResult:
    """Runs lmms-eval's prompts and scorers on our generation. A killed evaluation continues from its predictions.

    Args:
        checkpoint: folder or hub id.
        benchmarks: names, see :func:`dpa.evaluate.harness.tasks.task_requests`; ``paper`` is the paper's seven.
        data: folder with one folder per benchmark; None: lmms-eval loads from the hub.
        out: gets predictions, ``TASK.samples.jsonl``, ``results.json`` and ``lmms-eval.log``; None: as ``dpa eval``
            would choose, with ``lmms-eval`` below it.

    Raises:
        UserError: the extra is not installed, a task is unknown, or its files are not there.
        DpaError: the harness failed; names the log.
    """
    label, tasks_folder = _installed()
    names = [known for name in benchmarks for known in (PAPER if name == "paper" else (name,))]
    folder = Path(checkpoint)
    if out is None:
        out = folder_for(checkpoint) / "lmms-eval"
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        request = Request(
            checkpoint=str(folder.absolute()) if folder.is_dir() else checkpoint,
            tasks=task_requests(names, data, out / "tasks", tasks_folder, limit=limit),
            out=str(out.absolute()),
            batch_size=batch_size,
            limit=limit,
        )
        request.write(out / "request.json")
    offline = data is not None
    metrics = _converse(out, _environment(datasets_offline=offline, hub_offline=offline and folder.is_dir()), progress)
    result = HarnessResult(harness=label, checkpoint=checkpoint, predictions=out, metrics=tuple(metrics))
    with disk_errors(out):
        write_json(out / "results.json", result.to_dict())
    return result


def _installed() -> tuple[str, Path]:
    """The column's label, and the folder of lmms-eval's tasks; without importing it."""
    spec = find_spec("lmms_eval")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"--harness lmms-eval needs an extra that is not installed: {_INSTALL}")
    try:
        label = f"lmms-eval {version('lmms-eval')}"
    except PackageNotFoundError:
        raise UserError(f"there is a folder lmms_eval, but no installed package of it: {_INSTALL}") from None
    return label, Path(spec.submodule_search_locations[0], "tasks")


def _environment(*, datasets_offline: bool, hub_offline: bool) -> dict[str, str]:
    # a launcher's variables would make lmms-eval wait for processes that do not exist
    environment = {name: value for name, value in os.environ.items() if name not in _LAUNCHER}
    environment["TOKENIZERS_PARALLELISM"] = "false"
    if datasets_offline:
        environment["HF_DATASETS_OFFLINE"] = "1"
    if hub_offline:
        environment["HF_HUB_OFFLINE"] = "1"
    return environment


def _converse(out: Path, environment: dict[str, str], progress: HarnessProgress | None) -> list[Metric]:
    """The worker's events, until it ends."""
    log = out / "lmms-eval.log"
    command = [sys.executable, "-m", "dpa.evaluate.harness.worker", str((out / "request.json").absolute())]
    metrics: list[Metric] = []
    shown: dict[str, Callable[[int, int], None]] = {}
    with open(log, "w", encoding="utf-8") as stderr:
        worker = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=stderr, stdin=subprocess.DEVNULL, env=environment, text=True
        )
        assert worker.stdout is not None
        try:
            for line in worker.stdout:
                event = json.loads(line)
                if event["event"] == "progress" and progress is not None:
                    name = event["benchmark"]
                    if name not in shown:
                        shown[name] = progress(name)
                    shown[name](event["done"], event["total"])
                elif event["event"] == "task":
                    metrics += [Metric(**item) for item in event["metrics"]]
                elif event["event"] == "error":
                    raise _told(event, log)
            code = worker.wait()
        finally:
            if worker.poll() is None:
                worker.terminate()
                worker.wait()
            worker.stdout.close()
    if code != 0:
        raise DpaError(_died(code, log))
    return metrics


def _told(event: dict[str, Any], log: Path) -> DpaError:
    if event["user"]:
        return UserError(event["message"])
    return DpaError(f"lmms-eval failed: {event['message']}; its log is {log}")


def _died(code: int, log: Path) -> str:
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    hint = " (out of memory? choose a smaller --batch-size)" if code == -signal.SIGKILL else ""
    tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL:])
    return f"lmms-eval's process {how}{hint}; the same command continues from its predictions. {log} ends with:\n{tail}"
