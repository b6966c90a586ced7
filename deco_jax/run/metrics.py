"""Reads metrics.jsonl, which a run may be writing to, and which a kill may have cut short."""

from __future__ import annotations

import json
import pathlib
from typing import Any


def read_rows(path: pathlib.Path) -> tuple[list[dict[str, Any]], int]:
    """Read metrics.jsonl.

    Returns:
        The rows in the order of the file, each with an integer under "step", and the number of damaged lines left out.
        Without a file: no rows, and 0.
    """
    rows, damaged = [], 0
    for line in path.read_bytes().decode(errors="replace").splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
            rows.append({**row, "step": int(row["step"])})
        except (ValueError, KeyError, TypeError):
            damaged += 1
    return rows, damaged
