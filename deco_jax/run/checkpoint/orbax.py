"""Adjusts Orbax so that a failed write is one line, writing takes little memory, and any folder name works."""

from __future__ import annotations

import asyncio
import functools
import glob
import hashlib
import os
import pathlib
import tempfile
from collections.abc import Awaitable, Callable
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging

from deco_jax.run import storage


@functools.cache
def hush_orbax() -> None:
    """Hide Orbax's log of errors, with a stack trace for each thread and array; it raises all of them, too."""
    logging.get_absl_logger().addFilter(lambda record: "/orbax/" not in record.pathname)


@functools.cache
def settle_failed_writes() -> None:
    """Make Orbax wait for the other writes of a batch when one of them fails.

    By default it closes its event loop at once. The other writes then end in a closed loop, and TensorStore prints a
    stack trace for each. Waiting for the folder is the first thing that a batch does in that loop.
    """
    handler = ocp.type_handlers.get_type_handler(jax.Array)
    serialize = handler.serialize

    async def serialize_and_settle(values: Any, infos: Any, args: Any = None) -> Any:
        for info in infos:
            info.await_path_creation = functools.partial(_settling, info.await_path_creation)
        return await serialize(values, infos, args)

    handler.serialize = serialize_and_settle


async def _settling(await_path_creation: Callable[[], Awaitable[None]]) -> None:
    loop: Any = asyncio.get_running_loop()
    if "close" not in vars(loop):
        loop.close = functools.partial(_settle_and_close, loop, loop.close)
    await await_path_creation()


def _settle_and_close(loop: asyncio.AbstractEventLoop, close: Callable[[], None]) -> None:
    if tasks := asyncio.all_tasks(loop):
        loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
    close()


class Manager(ocp.CheckpointManager):
    """Leaves JAX's preemption service to `preemption.Watch`.

    The service expects calls with ascending numbers, and a stop is lost if two callers count differently. Orbax would
    call it with the step.
    """

    def reached_preemption(self, step: int) -> bool:
        return False


class OneByOne(ocp.type_handlers.NumpyHandler):
    """Writes host arrays one after the other, and only then reads each of them (`mapping.Unread`).

    All at once, the arrays and their compressed copies would need the memory of two networks and as much again.
    """

    async def _background_serialize(self, values: Any, infos: Any, args: Any = None) -> None:
        for i, (value, info) in enumerate(zip(values, infos, strict=True)):
            array = value.read() if hasattr(value, "read") else value
            await super()._background_serialize([array], [info], [args[i] if args else ocp.SaveArgs()])
            del array


def without_patterns(folder: pathlib.Path) -> pathlib.Path:
    """Return a name for the folder that contains no pattern, because Orbax uses `glob` to find what each host wrote."""
    if storage.is_remote(folder) or glob.escape(str(folder)) == str(folder):
        return folder
    name = hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]  # the same on every host
    link = pathlib.Path(tempfile.gettempdir()) / f"deco_jax_{os.getuid()}_{name}"
    folder.mkdir(parents=True, exist_ok=True)
    if not link.is_symlink() or pathlib.Path(os.readlink(link)) != folder:
        link.unlink(missing_ok=True)
        link.symlink_to(folder, target_is_directory=True)
    return link
