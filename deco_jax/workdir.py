"""The folder that a run writes to."""

from __future__ import annotations

import pathlib

from deco_jax import distributed
from deco_jax.errors import UserError


def make_workdir(folder: pathlib.Path) -> None:
    """Create a folder and make sure it can be written to; with several hosts, by the first, for all.

    Raises:
        UserError: it is a file, or can't be written.
    """
    distributed.on_main_host(lambda: _make(folder))


def _make(folder: pathlib.Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"--workdir: {folder} is, or lies under, a file; choose a folder") from error
    except OSError as error:
        raise UserError(f"--workdir: {folder} can't be written: {error.strerror}; choose another") from error
