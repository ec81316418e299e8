"""``python -m dpa``."""

from dpa.cli import main

main()
