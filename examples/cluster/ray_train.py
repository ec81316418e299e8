"""Ray Train starts the ranks, dpa does the rest: ``python ray_train.py RECIPE WORKERS [key=value ...]``.

Needs ``pip install "ray[train]"``. Ray's ``TorchTrainer`` sets torch's variables in each worker, as torchrun does. All
machines see the recipe, its data and its store on one disk; a restarted run continues from the last saved state.
"""

from __future__ import annotations

import sys
from typing import Any

from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer


def worker(settings: dict[str, Any]) -> None:
    """One rank."""
    import dpa

    dpa.run(dpa.load_recipe(settings["recipe"], settings["overrides"]))


def main() -> None:
    """Reads the command line."""
    recipe, workers, *overrides = sys.argv[1:]
    TorchTrainer(
        worker,
        train_loop_config={"recipe": recipe, "overrides": overrides},
        scaling_config=ScalingConfig(num_workers=int(workers), use_gpu=True),
        run_config=RunConfig(failure_config=FailureConfig(max_failures=3)),
    ).fit()


if __name__ == "__main__":
    main()
