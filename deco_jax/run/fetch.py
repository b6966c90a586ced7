"""Local copies of weights in a bucket, fetched only once."""

from __future__ import annotations

import hashlib
import os
import pathlib
import sys
import time
from typing import Any

from deco_jax.errors import UserError
from deco_jax.run import files, storage

PROGRESS_SECONDS = 5.0


def cache_folder() -> pathlib.Path:
    """Return the folder for copies of remote weights: $DECO_JAX_CACHE, or else deco_jax in the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return pathlib.Path(os.environ.get("DECO_JAX_CACHE") or os.path.join(home, "deco_jax", "fetched"))


def local(name: str | os.PathLike[str]) -> pathlib.Path:
    """Return a file or folder of weights on this machine: `name` itself, or a copy of the remote one, fetched once.

    A copy is checked against the MD5 that the bucket gives, if any, and fetched again when the object changes. The copy
    of a folder loses the files that the folder has lost.

    Raises:
        UserError: there is no such object, or what arrived is damaged.
    """
    if not storage.is_remote(name):
        return pathlib.Path(name)
    name = os.fspath(name).rstrip("/")
    found = storage.system(name).find(name, detail=True)
    if not found:
        raise UserError(f"{name}: no such file or folder; check the path")
    single = name[5:] in found
    target = cache_folder() / hashlib.sha256(name.encode()).hexdigest()[:16] / name.rpartition("/")[2]
    for key, info in sorted(found.items()):
        relative = "" if single else key.removeprefix(name[5:] + "/")
        _fetch(f"{name[:5]}{key}", info, target / relative if relative else target)
    for note in [] if single else list(target.rglob(".*.stamp")):
        copy = note.with_name(note.name[1:].removesuffix(".stamp"))
        if f"{name[5:]}/{copy.relative_to(target).as_posix()}" not in found:  # the bucket no longer has it
            copy.unlink(missing_ok=True)
            note.unlink(missing_ok=True)
    return target


def _fetch(name: str, info: dict[str, Any], target: pathlib.Path) -> None:
    note, expected = target.with_name(f".{target.name}.stamp"), storage.stamp_of(info)
    if target.exists() and note.exists() and note.read_text() == expected:
        return
    digest, began, size, done, said = hashlib.md5(), time.monotonic(), int(info["size"]), 0, 0.0
    with files.whole(target, shared=True) as part, part.open("wb") as file:
        with storage.system(name).open(name, "rb", block_size=2**24, cache_type="readahead") as source:
            while data := source.read(2**24):
                file.write(data)
                digest.update(data)
                done += len(data)
                spent = time.monotonic() - began
                if spent - said > PROGRESS_SECONDS:
                    said = spent
                    _say(f"fetching {name}: {done / 2**20:,.0f} of {size / 2**20:,.0f} MiB, {spent:.0f} s")
        wanted = storage.md5(info)
        if wanted and wanted != digest.digest() and storage.has_kms_key(name):
            wanted = None
        if done != size or (wanted and wanted != digest.digest()):
            raise UserError(f"{name} arrived damaged ({done:,} of {size:,} bytes, MD5 {digest.hexdigest()}); try again")
    with files.whole(note, shared=True) as part:
        part.write_text(expected)
    checked = f"MD5 {digest.hexdigest()}, {'as the bucket says' if wanted else 'which the bucket does not give'}"
    _say(f"fetched {name} to {target}: {size / 2**20:,.1f} MiB in {time.monotonic() - began:.1f} s; {checked}")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
