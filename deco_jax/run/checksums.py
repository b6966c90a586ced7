"""Checksums of the files of a checkpoint, which reveal damage by a disk or a copy.

    checkpoints/STEP/checksums.json   {"crc32": {"params/d/0a1b…": [bytes, CRC-32], ...}}
    in a bucket                       {"service": {"params/d/0a1b…": [bytes, {"md5": …, "crc32c": …}], ...}}

Arrays are stored as plain compressed bytes, so a damaged one is often still readable. A bucket's service keeps
checksums
itself: they are listed, with one request per thousand objects, and nothing is read back.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import zlib
from typing import Any

import jax

from deco_jax.run import files, storage

FILE = "checksums.json"
CHUNK = 2**22


def write(folder: pathlib.Path) -> None:
    """Store the checksums of the files of a checkpoint's items; Orbax's own notes may still change after that."""
    noted: dict[str, Any]
    if storage.is_remote(folder):
        found = _listed(os.fspath(folder))
        noted = {"service": {name: value for name, value in found.items() if "/" in name and not _is_commit(name)}}
    else:
        paths = [path for path in sorted(folder.glob("*/**/*")) if path.is_file() and not _is_commit(path.name)]
        noted = {"crc32": {str(path.relative_to(folder)): _read(path) for path in paths}}
    with files.whole(folder / FILE) as part:
        part.write_text(json.dumps(noted, indent=1) + "\n")


def check(folder: pathlib.Path, *items: str) -> None:
    """Compare the files of a checkpoint, or of some of its items, with their checksums; several hosts share the work.

    Older checkpoints have no checksums, and neither do those whose run was killed before writing them; these pass. The
    checkpoint may have been copied to or from a bucket in the meantime.

    Raises:
        ValueError: a file is missing or was changed.
    """
    try:
        noted = json.loads((folder / FILE).read_text())
    except FileNotFoundError:
        return
    listed = _listed(os.fspath(folder)) if storage.is_remote(folder) and "service" in noted else {}
    expected = noted["service" if "service" in noted else "crc32"]
    names = [name for name in sorted(expected) if not items or name.partition("/")[0] in items]
    for name in names[jax.process_index() :: jax.process_count()]:
        path = folder / name
        if not (name in listed or path.exists()):
            raise ValueError(f"its file {name} is missing")
        if "service" in noted:
            size, sums = listed[name] if name in listed else _digests(path)
            same = size == expected[name][0] and all(
                sums.get(kind, value) == value for kind, value in expected[name][1].items()
            )
        else:
            same = _read(path) == expected[name]
        if not same:
            raise ValueError(f"its file {name} isn't what was written: its checksum differs")


def _listed(root: str) -> dict[str, list[Any]]:
    """List all objects under `root`, from the bucket's service: relative path → [bytes, {"md5" or "crc32c": …}]."""
    found = storage.system(root).find(root, detail=True)
    prefix = root.rstrip("/").removeprefix(root[:5]) + "/"
    # What was written together is encrypted alike.
    hidden = bool(found) and storage.has_kms_key(f"{root[:5]}{min(found)}")
    return {name.removeprefix(prefix): [int(info["size"]), _sums(info, hidden)] for name, info in sorted(found.items())}


def _sums(info: dict[str, Any], hidden: bool) -> dict[str, str]:
    md5, crc32c = None if hidden else storage.md5(info), info.get("crc32c")
    return {**({"md5": md5.hex()} if md5 else {}), **({"crc32c": crc32c} if crc32c else {})}


def _is_commit(name: str) -> bool:
    return name.rpartition("/")[2] == "commit_success.txt"


def _digests(path: pathlib.Path) -> tuple[int, dict[str, str]]:
    """Return the bytes of a file and its MD5, the only one of the service's checksums that Python computes."""
    digest = hashlib.md5()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
        return file.tell(), {"md5": digest.hexdigest()}


def _read(path: pathlib.Path) -> list[int]:
    """Return the number of bytes in a file, and their CRC-32."""
    size = value = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            size, value = size + len(chunk), zlib.crc32(chunk, value)
    return [size, value]
