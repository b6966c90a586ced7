"""The folder that a mode writes to, and those it reads."""

from __future__ import annotations

import os
import pathlib

from deco_jax.errors import UserError
from deco_jax.run import distributed, storage


def make_workdir(folder: pathlib.Path) -> None:
    """Create a folder and make sure that it is writable; with several hosts, the first does it for all.

    Raises:
        UserError: it is a file, or can't be written.
    """
    distributed.on_main_host(lambda: make_folder(folder))


def make_folder(folder: pathlib.Path) -> None:
    """Do the same on this host only, without starting a device."""
    if storage.is_remote(folder):
        _check_bucket(folder)
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink(missing_ok=True)  # runs that share a folder may do this at the same time
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"{folder} is a file, or is below one; choose another folder") from error
    except OSError as error:
        raise UserError(f"{folder} can't be written: {error.strerror}; choose another folder") from error


def _check_bucket(folder: str | os.PathLike[str]) -> None:
    """Write an object to a folder and remove it; raise UserError if the bucket refuses."""
    probe = os.path.join(os.fspath(folder), ".writable")
    try:
        storage.put(probe, b"")
        storage.system(probe).rm_file(probe)
    except FileNotFoundError as error:
        raise UserError(f"{folder} can't be written: there is no such bucket; create it, or check the name") from error
    except Exception as error:
        raise UserError(
            storage.refusal(error) or f"{folder} can't be written: {error}; choose another folder"
        ) from error


def listed(names: str) -> list[pathlib.Path]:
    """Return the folders of a comma-separated setting."""
    return [storage.path(name.strip()) for name in names.split(",") if name.strip()]


def short_names(folders: list[pathlib.Path]) -> list[str]:
    """Shorten paths to their last parts, as many as it takes to tell them apart."""
    parts = [storage.absolute(path).parts for path in folders]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-length:]) for p in parts]
        if len(set(names)) == len(names):
            break
    return names
