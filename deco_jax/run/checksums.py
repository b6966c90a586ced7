"""What tells a checkpoint from one that a disk or a copy has changed: CRC-32 of each of its files.

    checkpoints/STEP/checksums.json   {"crc32": {"params/d/0a1b…": [bytes, CRC-32], ...}}

Arrays are stored as plain compressed bytes, and one that was changed is often still readable.
"""

from __future__ import annotations

import json
import pathlib
import zlib

import jax

from deco_jax.run import files

FILE = "checksums.json"
CHUNK = 2**22


def write(folder: pathlib.Path) -> None:
    """Note the checksums of the files of a checkpoint's items; Orbax's own notes beside these may still change."""
    found = {
        str(path.relative_to(folder)): _read(path)
        for path in sorted(folder.glob("*/**/*"))
        if path.is_file() and path.name != "commit_success.txt"
    }
    with files.whole(folder / FILE) as part:
        part.write_text(json.dumps({"crc32": found}, indent=1) + "\n")


def check(folder: pathlib.Path, item: str = "") -> None:
    """Compare the files of a checkpoint, or of one item of it, with their checksums; with several hosts each a share.

    Older checkpoints have none, nor has one whose run was killed in between: these pass.

    Raises:
        ValueError: a file is missing or was changed.
    """
    try:
        noted = json.loads((folder / FILE).read_text())["crc32"]
    except FileNotFoundError:
        return
    names = [name for name in sorted(noted) if not item or name.startswith(f"{item}/")]
    for name in names[jax.process_index() :: jax.process_count()]:
        path = folder / name
        if not path.exists():
            raise ValueError(f"its file {name} is missing")
        if _read(path) != noted[name]:
            raise ValueError(f"its file {name} isn't what was written: its checksum differs")


def _read(path: pathlib.Path) -> list[int]:
    """The bytes of a file, and their CRC-32."""
    size = value = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            size, value = size + len(chunk), zlib.crc32(chunk, value)
    return [size, value]
