"""Growing files in a bucket: a text log, and TensorBoard's events by tensorboardX."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import sys
import threading
from types import ModuleType
from typing import Any, ClassVar

from deco_jax.run import storage

MAX_EVENT_BYTES = 2**24


def tensorboard() -> ModuleType:
    """Import tensorboardX without what it would import only because it is installed.

    That is PyTorch, whose tensors nobody gives it here, and the clients of clouds, where this module writes in its
    place. Together they take two to three seconds of every start.
    """
    modules: dict[str, Any] = sys.modules
    hidden = [name for name in ("torch", "boto3", "google.cloud.storage") if name not in modules]
    modules |= dict.fromkeys(hidden)  # None makes an import fail as if it weren't installed
    try:
        return importlib.import_module("tensorboardX")
    finally:
        for name in hidden:
            del modules[name]


class ObjectLog(io.StringIO):
    """A growing text file in a bucket: held in memory, and uploaded as a whole by `sync`.

    Closing it uploads nothing: where a process ends by an error, Python closes it after the threads have ended that an
    upload would wait for.
    """

    def __init__(self, name: str | os.PathLike[str]) -> None:
        super().__init__()
        self._name = name
        with contextlib.suppress(FileNotFoundError):
            self.write(storage.path(name).read_text())
        self._put = self.getvalue()

    def truncate(self, size: int | None = None) -> int:
        size = super().truncate(size)
        self.seek(size)
        return size

    def sync(self) -> None:
        if (text := self.getvalue()) != self._put:
            storage.put(self._name, text.encode())
            self._put = text


class EventFile:
    """A file of TensorBoard events in a bucket, held in memory until `sync`; when it is full, another one follows."""

    _open: ClassVar[list[EventFile]] = []

    def __init__(self, name: str) -> None:
        self._name, self._part = name, 0
        self._lock = threading.Lock()  # tensorboardX writes in a thread of its own
        self._data = b""
        self._changed = False
        self._open.append(self)

    def write(self, data: bytes) -> None:
        with self._lock:
            self._data += data
            self._changed = True

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass

    @classmethod
    def sync(cls) -> None:
        for file in cls._open:
            file._sync()

    def _sync(self) -> None:
        with self._lock:
            data, changed, self._changed = self._data, self._changed, False
        if changed:
            storage.put(f"{self._name}.{self._part:04d}" if self._part else self._name, data)
        if len(data) >= MAX_EVENT_BYTES:
            with self._lock:  # later events go to the next file; TensorBoard reads the files in order
                self._data, self._part = self._data[len(data) :], self._part + 1


class EventFiles:
    """Opens files in a bucket for tensorboardX."""

    def open(self, name: str) -> EventFile:
        return EventFile(name)

    def directory_check(self, name: str) -> None:
        """Do nothing: a bucket needs no folders."""


def register(folder: str | os.PathLike[str]) -> None:
    """Make tensorboardX write through this module if `folder` is in a bucket."""
    if storage.is_remote(folder):
        tensorboard()
        from tensorboardX import record_writer

        record_writer.register_writer_factory(os.fspath(folder).partition(":")[0], EventFiles())
