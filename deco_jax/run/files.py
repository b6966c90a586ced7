"""Writes files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import pathlib
import time
import uuid
from collections.abc import Iterator

import numpy as np

from deco_jax.run import storage

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the errors of a full disk or a limit

STALE = 3600.0  # seconds after which a part is abandoned


@contextlib.contextmanager
def whole(path: str | os.PathLike[str], *, shared: bool = False) -> Iterator[pathlib.Path]:
    """Yield a path to write to; it replaces `path` if the block succeeds and is removed if it fails.

    For a file in a bucket, that path is on this machine, and the file is uploaded as one object.

    Args:
        shared: several processes may write the same file at once; the last one wins. Parts left behind by a kill are
            removed the next time.

    Raises:
        OSError: the file, or its folder, can't be written.
    """
    if storage.is_remote(path):
        with storage.staged(path) as part:
            yield part
        return
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Use a fixed name if possible: whatever a kill leaves behind is then overwritten the next time.
    part = path.with_name(f"{path.name}{'.' + uuid.uuid4().hex if shared else ''}.part")
    if shared:
        for left in path.parent.glob(f"{glob.escape(path.name)}.*.part"):
            with contextlib.suppress(OSError):
                if time.time() - left.stat().st_mtime > STALE:
                    left.unlink()
    try:
        yield part
        part.replace(path)
    except BaseException as error:
        if isinstance(error, OSError) and error.errno in FULL and error.filename is None:
            error.filename = os.fspath(path)
        with contextlib.suppress(OSError):
            part.unlink()
        raise


def move(path: pathlib.Path, target: pathlib.Path) -> None:
    """Give a file or a folder another path, where nothing is yet; in a bucket object by object."""
    if storage.is_remote(path):
        storage.system(path).mv(os.fspath(path), os.fspath(target), recursive=True)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    path.rename(target)


def save_array(path: str | os.PathLike[str], array: np.ndarray) -> None:
    """Write a .npy file, whole or not at all.

    Raises:
        OSError: it can't be written; it has the system's reason, which `np.save` loses.
    """
    array = np.ascontiguousarray(array)
    with whole(path) as part, part.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        file.write(array.data)
