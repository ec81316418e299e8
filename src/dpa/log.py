"""Messages to the user. A leaf: everything goes to stderr, so that ``--json`` owns stdout."""

from __future__ import annotations

import logging
import sys

_NAME = "dpa"


def get_logger(name: str = _NAME) -> logging.Logger:
    """The package's logger, or a child of it (``get_logger(__name__)``)."""
    return logging.getLogger(name)


def setup_logging(*, quiet: bool = False) -> None:
    """Plain lines on stderr; called by the command line only, so a program that imports dpa keeps its own logging."""
    logger = logging.getLogger(_NAME)
    logger.setLevel(logging.WARNING if quiet else logging.INFO)
    logger.propagate = False
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
