"""Ctrl-C before there is anything to save: one line and status 130, whatever was going on; and commands that may save
before they end."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any, NoReturn

LINE = "interrupted; the same command continues from what is saved"


def end_at_once() -> None:
    """Answer Ctrl-C with the line and exit, while modules are imported and nothing needs to be closed."""
    signal.signal(signal.SIGINT, _end)


def raise_always() -> None:
    """Answer Ctrl-C with KeyboardInterrupt, also if it hits a callback whose exceptions Python ignores.

    JAX has such callbacks for the garbage collector. Python reports the exception as ignored and continues; then the
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


@contextlib.contextmanager
def waits_for(what: str) -> Iterator[None]:
    """While entered, say at once that a signal only takes effect after `what`; a second Ctrl-C ends the process.

    Python runs signal handlers between two of its instructions, and compiling is an instruction that takes minutes.
    Only the file descriptor set by `signal.set_wakeup_fd` is written to at once; a thread reads it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)

    def watch() -> None:
        interrupted = False
        while number := os.read(reading, 1)[0]:
            if number == signal.SIGINT and interrupted:
                _end(number, None)
            interrupted = interrupted or number == signal.SIGINT
            said = f"asked to end ({signal.Signals(number).name}): waiting for {what}"
            if number == signal.SIGINT:
                said = f"interrupted: waiting for {what}; Ctrl-C again ends at once"
            # On a terminal, start a new line after its ^C or a live line.
            os.write(2, f"{chr(10) if os.isatty(2) else ''}{said}\n".encode())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.write(writing, b"\0")
        thread.join()
        os.close(reading)
        os.close(writing)


def run(command: Sequence[str], folder: str | os.PathLike[str]) -> int:
    """Run a command in a folder and return its status.

    Asked to stop, by Ctrl-C or SIGTERM, this process exits with a status for that, but only once the command has ended,
    which may have something to save.
    """
    asked: list[int] = []
    process: subprocess.Popen | None = None

    def stop(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        if process is not None and number != signal.SIGINT:  # which a terminal sends to both
            process.send_signal(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        process = subprocess.Popen(command, cwd=folder)
        if asked:  # meanwhile
            process.terminate()
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if asked:
        print(LINE, file=sys.stderr)
        sys.exit(128 + asked[0])
    return code


def end() -> NoReturn:
    """Print the line and end this process with status 130, after what is registered with atexit.

    The interpreter's own shutdown is skipped. JAX compiles in threads of its own, and an interrupt only ends the wait
    for them; in a shutdown, they would go on with what has been deleted, and crash the process.
    """
    print(LINE, file=sys.stderr)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(130)


def _end(number: int, frame: FrameType | None) -> NoReturn:
    os.write(2, f"{LINE}\n".encode())
    os._exit(130)
