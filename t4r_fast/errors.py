"""Errors that a user can mend."""

from __future__ import annotations


class InputError(ValueError):
    """Bad input from a user: a file, a column, a value or an option.

    The message names what is wrong and what to do. The command line prints it without a traceback
    and exits with status 1.
    """
