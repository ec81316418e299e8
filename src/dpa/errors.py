"""What can go wrong, by who can mend it. A leaf: imports nothing of dpa.

The command line turns a :class:`DpaError` into one message without a traceback and exits with ``exit_code``.
"""

from __future__ import annotations


class DpaError(Exception):
    """Anything that dpa raises on purpose. Exit code 1: the run failed, the input may be fine."""

    exit_code = 1
    everywhere = False
    """Every rank raises it: it is enough that one prints it."""


class UserError(DpaError, ValueError):
    """The user's input is wrong. The message says what, where and what to do. Exit code 2."""

    exit_code = 2


class RecipeError(UserError):
    """A recipe does not parse, names an unknown key, or asks for something impossible."""


class DataError(UserError):
    """A data file, a sample or an image cannot be used; names file and sample."""


class ModelError(UserError):
    """A model folder, hub id, family, connector or adapter does not fit."""


class CheckpointError(DpaError):
    """A saved state cannot be read or does not belong to this run."""


class StorageError(DpaError):
    """The disk is full or not writable; nothing that was saved before is lost."""


class NonFiniteError(DpaError):
    """Loss or gradient is not finite; names step, samples, first module and the last good checkpoint."""
