"""Stages to artefacts: ``run`` and ``dry_run``."""

from dpa.pipeline.run import Plan, RunResult, dry_run, run

__all__ = ["Plan", "RunResult", "dry_run", "run"]
