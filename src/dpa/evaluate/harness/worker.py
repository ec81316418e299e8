"""``python -m dpa.evaluate.harness.worker REQUEST.json``: runs lmms-eval in this process, which ends with it.

Not for people: ``dpa eval --harness lmms-eval`` starts it, with the environment that local data needs.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback
from argparse import Namespace
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from dpa.errors import DpaError, UserError
from dpa.evaluate.harness.door import Request, TaskRequest, metrics_of

Emit = Callable[[dict[str, Any]], None]


def main(arguments: Sequence[str]) -> int:
    """Exit code 0, or 1 after an event that says why."""
    events = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)  # libraries print; only events may pass

    def emit(event: dict[str, Any]) -> None:
        events.write(json.dumps(event, ensure_ascii=False) + "\n")

    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s")
    try:
        _run(Request.read(Path(arguments[0])), emit)
    except Exception as error:
        traceback.print_exc()
        error = _cause(error)
        known = isinstance(error, DpaError)
        told = str(error) if known else f"{type(error).__name__}: {error}"
        emit({"event": "error", "user": isinstance(error, UserError), "message": told})
        return 1
    return 0


def _cause(error: Exception) -> Exception:
    """lmms-eval tries some things several times and then raises tenacity's error around the last one."""
    attempt = getattr(error, "last_attempt", None)
    inner = None if attempt is None else attempt.exception()
    return inner if isinstance(inner, Exception) else error


def _run(request: Request, emit: Emit) -> None:
    try:
        from lmms_eval.evaluator import simple_evaluate
        from lmms_eval.tasks import TaskManager
    except Exception as error:  # torchvision raises RuntimeError where it was built for another torch
        hint = "; torchvision does not fit torch: install its build for this torch, or uninstall it"
        raise UserError(
            f"lmms-eval does not import ({type(error).__name__}: {error}){hint if 'torchvision' in str(error) else ''}"
        ) from error
    from dpa.evaluate.devices import device_names
    from dpa.evaluate.harness.model import DpaModel
    from dpa.evaluate.load import load_model, open_processor
    from dpa.models.digest import digest_of_model

    managers = _managers(request.tasks, TaskManager)
    processor = open_processor(request.checkpoint)
    model = load_model(request.checkpoint, device_names(1)[0])
    out = Path(request.out)

    def progress(done: int, total: int) -> None:
        emit({"event": "progress", "benchmark": current.benchmark, "done": done, "total": total})

    harness_model = DpaModel(
        model,
        processor,
        identity=digest_of_model(model.state_dict()),
        out=out,
        batch_size=request.batch_size,
        progress=progress,
    )
    for current, manager in zip(request.tasks, managers, strict=True):
        # one call per task: lmms-eval cuts later tasks to the length of the shortest one before them
        results = simple_evaluate(
            model=harness_model,
            tasks=[current.task],
            limit=request.limit,
            batch_size=request.batch_size,
            bootstrap_iters=0,
            task_manager=manager,
            log_samples=True,
            process_docs_parallel=1,  # some tasks' scorers count in globals
            cli_args=Namespace(output_path=str(out), process_with_media=False),
        )
        _write_samples(out, results["samples"])
        emit({"event": "task", "metrics": _as_dicts(current, results)})


def _as_dicts(task: TaskRequest, results: dict[str, Any]) -> list[dict[str, Any]]:
    from dataclasses import asdict

    return [asdict(item) for item in metrics_of(task.benchmark, results["results"], results["n-samples"])]


def _managers(tasks: Sequence[TaskRequest], manager: Any) -> list[Any]:
    """One per task; lmms-eval's own tasks are read at most once, and only where one of them is asked for.

    Raises:
        UserError: a task is not known.
    """
    defaults = None
    found = []
    for task in tasks:
        if task.folder is not None:
            own = manager(include_defaults=False, include_path=[task.folder])
        else:
            defaults = own = defaults or manager()
        if task.task not in own.all_tasks:
            raise UserError(_unknown(task, own.all_tasks))
        found.append(own)
    return found


def _unknown(task: TaskRequest, known: list[str]) -> str:
    where = "lmms-eval" if task.folder is None else task.folder
    near = get_close_matches(task.task, known, n=8, cutoff=0.5)
    listed = ", ".join(near if len(known) > 40 else known) or "nothing like it"
    return f"{where} has no task {task.task!r}; there is {listed}; all of lmms-eval's: python -m lmms_eval --tasks list"


def _write_samples(out: Path, samples: dict[str, list[dict[str, Any]]]) -> None:
    """What lmms-eval made of each answer."""
    for task, records in samples.items():
        lines = (json.dumps(record, ensure_ascii=False, default=str) + "\n" for record in records)
        (out / f"{task}.samples.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
