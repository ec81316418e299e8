"""Messages to the user."""

import io
import logging

from dpa.log import get_logger, said_once


def test_said_once_leaves_out_what_was_said_before() -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    root, child = get_logger(), get_logger("dpa.models.families")
    level = root.level
    root.setLevel(logging.INFO)
    root.addHandler(handler)
    try:
        with said_once():
            for name in ("a", "a", "b"):
                child.info("%s joins", name)
        child.info("%s joins", "a")
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
    assert stream.getvalue().splitlines() == ["a joins", "b joins", "a joins"]
    assert not handler.filters
