"""One run at a time in a workdir, on local disks and on shared ones, and no lock that a killed run leaves behind.

WORKDIR/.lock is locked with flock(2), which the system releases when the process ends, however it ends. Some shared
file systems only keep such locks within one machine, or have none. So the file also says who holds it, with a number
that the holder increments every few seconds; a holder on another machine whose number stands still is gone. A bucket
has no locks. There, only the record decides: the request that creates it fails if there is one, and a lock counts while
its number moves; on the same machine, in the same container, a lock whose process is gone counts no longer.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import fcntl
import json
import os
import pathlib
import socket
import threading
import time
import uuid
from typing import Any

from absl import logging

from deco_jax.errors import UserError
from deco_jax.run import storage

FILE = ".lock"
BEAT_SECONDS = 10.0
# A holder on another machine that is silent for this long is gone; its beats may be late on a slow disk.
SILENT_SECONDS = 45.0
# Clocks differ between machines, but not by this much: a record that is older needs no waiting.
LONG_AGO_SECONDS = 900.0
RECORD_BYTES = 512  # written at once, so that no reader sees half of it

_held: dict[pathlib.Path, RunLock] = {}


@atexit.register
def _release_all() -> None:
    """Release all locks, so that a run on another machine needn't wait until this one counts as gone."""
    for held in list(_held.values()):
        held._count = 1
        held.release()


class RunLock:
    """The right of this process to write to a workdir, from `acquire` to `release`.

    A process may acquire the same workdir several times; the last release gives it back.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder, self.path = folder, folder / FILE
        self._token, self._count, self._beat = uuid.uuid4().hex, 0, 0
        self._file = -1
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            UserError: another process holds it; the message has its host and process id.
        """
        if (own := _held.get(self.path)) is not None and own is not self:
            own._count += 1
            return
        if not self._count:
            self._open()
            try:
                self._check_other_machines()
                self._write()
            except BaseException:
                self._close()
                raise
            self._thread = threading.Thread(target=self._keep_beating, daemon=True)
            self._thread.start()
            _held[self.path] = self
        self._count += 1

    def release(self) -> None:
        """Release the lock; nothing happens if it isn't held."""
        held = _held.get(self.path)
        if held is None:
            return
        held._count -= 1
        if held._count:
            return
        del _held[self.path]
        held._done.set()
        assert held._thread is not None
        held._thread.join()
        with contextlib.suppress(held._unreachable()):
            held.path.unlink()
        held._close()

    def _open(self) -> None:
        if storage.is_remote(self.path):
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        while True:
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                record = _read(self.path)
                if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                    os.close(self._file)
                    raise self._in_use(record) from error
                # This file system has no such locks, so only the record decides.
            # Whoever held it may have removed the file between the two calls.
            with contextlib.suppress(OSError):
                if os.fstat(self._file).st_ino == self.path.stat().st_ino:
                    return
            os.close(self._file)

    def _check_other_machines(self) -> None:
        """Return once no holder on another machine shows that it is alive."""
        record = _read(self.path)
        if not record:
            return
        if record.get("machine") == _machine():
            if not storage.is_remote(self.path):
                return  # the lock is ours, so a holder on this machine is gone
            # Processes have other numbers in another container, and a number may be another process's by now.
            here = record.get("processes", _process_namespace()) == _process_namespace()
            if here and not _is_alive(int(record.get("process", 0))):
                return
        if time.time() - float(record.get("time", 0)) > LONG_AGO_SECONDS:
            return
        logging.warning(
            "%s was last used by process %s on %s: waiting %.0f s to see whether it is still running",
            self.folder,
            record.get("process"),
            record.get("host"),
            SILENT_SECONDS,
        )
        end = time.monotonic() + SILENT_SECONDS
        while time.monotonic() < end:
            time.sleep(min(BEAT_SECONDS, 1.0))
            now = _read(self.path)
            if not now:  # released
                return
            if now != record:
                raise self._in_use(now)

    def _in_use(self, record: dict[str, Any]) -> UserError:
        who = f"process {record.get('process')} on {record.get('host')}" if record else "another process"
        return UserError(
            f"{self.folder} is in use by {who}; wait until that run ends, stop it, or give another --workdir"
        )

    def _write(self) -> None:
        record = {
            "host": socket.gethostname(),
            "process": os.getpid(),
            "machine": _machine(),
            "processes": _process_namespace(),
            "token": self._token,
            "beat": self._beat,
            "time": time.time(),
        }
        if storage.is_remote(self.path):
            write = storage.put if self._beat or _read(self.path) else storage.create
            try:
                write(self.path, json.dumps(record).encode())
            except FileExistsError as error:
                raise self._in_use(_read(self.path)) from error
            return
        # Open it again each time: network file systems only show other machines what was closed.
        file = os.open(self.path, os.O_WRONLY)
        try:
            os.pwrite(file, json.dumps(record).encode().ljust(RECORD_BYTES), 0)
        finally:
            os.close(file)

    def _unreachable(self) -> type[Exception]:
        """The errors that a disk raises, or the libraries for a bucket, also when the interpreter is shutting down."""
        return Exception if storage.is_remote(self.path) else OSError

    def _close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _keep_beating(self) -> None:
        while not self._done.wait(BEAT_SECONDS):
            self._beat += 1
            with contextlib.suppress(
                Exception if storage.is_remote(self.path) else OSError
            ):  # a full or unreachable disk, which the run itself will notice
                self._write()


def _read(path: pathlib.Path) -> dict[str, Any]:
    """Read the holder's record; {} if there is none."""
    try:
        record = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return process != os.getpid()


def _process_namespace() -> str:
    """Return an id of the container, within whose processes a number is unique."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _machine() -> str:
    """Return an id that differs between machines, even if their names are equal, and between boots of a machine."""
    try:
        return pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()
