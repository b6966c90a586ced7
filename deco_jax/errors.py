"""The one exception that means: the user can mend this, and the message says how."""

from __future__ import annotations


class UserError(Exception):
    """A mistake in what was asked for, not in the program.

    Its message is one line: what is wrong and what to do about it. `main.py` prints that line without a
    traceback and exits with status 1.
    """
