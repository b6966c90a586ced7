"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import pathlib
import uuid
from collections.abc import Iterator


@contextlib.contextmanager
def whole(path: str | os.PathLike[str], *, shared: bool = False) -> Iterator[pathlib.Path]:
    """A path to write to, which takes the place of `path` if the block ends well and is removed if it doesn't.

    Args:
        shared: several processes may write the same file at once; the last one wins.

    Raises:
        OSError: the file, or a folder that it lies in, can't be written.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # A fixed name where that will do: what a kill leaves behind is written over the next time.
    part = path.with_name(f"{path.name}{'.' + uuid.uuid4().hex if shared else ''}.part")
    try:
        yield part
        part.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise
