"""Ties worker processes to the main process."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading


def follow_main() -> None:
    """Prepare a worker as it starts.

    The main process answers Ctrl-C and SIGTERM, by saving first; and a worker never outlives it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    main = multiprocessing.parent_process()
    if main is not None:

        def follow() -> None:
            main.join()
            os._exit(1)

        threading.Thread(target=follow, daemon=True).start()
