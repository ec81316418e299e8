"""Messages to the user. A leaf: everything goes to stderr, so that ``--json`` owns stdout."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_NAME = "dpa"


def get_logger(name: str = _NAME) -> logging.Logger:
    """The package's logger, or a child of it (``get_logger(__name__)``)."""
    return logging.getLogger(name)


def setup_logging(*, quiet: bool = False, silent: bool = False) -> None:
    """Plain lines on stderr; called by the command line only, so a program that imports dpa keeps its own logging.

    Args:
        quiet: warnings only.
        silent: nothing at all, of libraries neither: another rank speaks.
    """
    logger = logging.getLogger(_NAME)
    logger.setLevel(logging.CRITICAL if silent else logging.WARNING if quiet else logging.INFO)
    if silent:
        warnings.filterwarnings("ignore")
    logger.propagate = False
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)


@contextmanager
def said_once() -> Iterator[None]:
    """Within it a message that was said before is left out: many recipes are checked one after the other."""
    seen: set[str] = set()

    def fresh(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        known = message in seen
        seen.add(message)
        return not known

    handlers = logging.getLogger(_NAME).handlers[:]  # a logger's own filters do not see what its children say
    for handler in handlers:
        handler.addFilter(fresh)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(fresh)


def quiet_libraries() -> None:
    """No bars for files that load in a moment, no advice to developers; downloads keep their bars. For commands."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging as transformers_logging

    downloads = not are_progress_bars_disabled()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    if downloads:
        enable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.")
