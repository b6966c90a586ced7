"""The exception for everything that the user can fix, whose message says how; and what damaged files raise."""

from __future__ import annotations

import re
import zipfile

# What NumPy raises for an .npz that is damaged, or is none.
NPZ_ERRORS = (OSError, ValueError, KeyError, EOFError, SyntaxError, AttributeError, zipfile.BadZipFile)


class UserError(Exception):
    """A mistake in the request, not in the program.

    Its message is one line: what is wrong and what to do about it. `main.py` prints that line without a
    traceback and exits with status 1.
    """


def reason(error: BaseException, most: int = 120) -> str:
    """Return an error's first line without terminal escape codes, such as colours."""
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", str(error)).strip()
    line = (text.splitlines() or [type(error).__name__])[0]
    return "".join(c for c in line if c.isprintable())[:most]
