"""Ctrl-C before there is anything to save: one line and status 130, whatever was going on."""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType
from typing import Any, NoReturn

LINE = "interrupted; the same command goes on from what is saved"


def end_at_once() -> None:
    """Answer Ctrl-C with the line and the end, while modules are imported and nothing needs to be closed."""
    signal.signal(signal.SIGINT, _end)


def raise_always() -> None:
    """Answer Ctrl-C with KeyboardInterrupt, also where it strikes a callback that Python takes no exception from.

    JAX has such callbacks for the garbage collector. Python reports the exception as ignored and goes on; then the
    signal is sent again.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    report = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if not issubclass(unraisable.exc_type, KeyboardInterrupt):
            return report(unraisable)
        again = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT))
        again.daemon = True
        again.start()

    sys.unraisablehook = hook


def _end(number: int, frame: FrameType | None) -> NoReturn:
    os.write(2, f"{LINE}\n".encode())
    os._exit(130)
