"""Reads and writes JiT's checkpoints (`checkpoint-last.pth`), the model and two averages under `net.`; detects layouts.

    {"model": {"net.…": …}, "model_ema1": …, "model_ema2": …, "epoch": …, perhaps "optimizer" and others}

The first average is the slower one, with 0.9999; the second has 0.9996.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from deco_jax.convert import torch_files
from deco_jax.convert.mapping import listed
from deco_jax.convert.torch_files import Checkpoint
from deco_jax.errors import UserError

FILE = "checkpoint-last.pth"  # the name that JiT's --resume looks for
PREFIX = "net."
ENTRIES = {"denoiser": "model", "ema": "model_ema1", "second_ema": "model_ema2"}


def read_official(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a checkpoint of JiT's code, or a Lightning checkpoint of DeCo or PixelGen.

    Raises:
        UserError: the file can't be read, is neither, or holds tensors of an unknown network.
    """
    content = torch_files.read_pickled(path)
    if ENTRIES["denoiser"] not in content:
        return torch_files.lightning(Path(path), content)
    networks: dict[str, Any] = {name: _network(Path(path), key, content.get(key)) for name, key in ENTRIES.items()}
    return Checkpoint(
        **networks,
        epoch=torch_files.counter(Path(path), content, "epoch"),
        has_optimizer=bool(content.get("optimizer")),
    )


def _network(path: Path, key: str, tensors: Any) -> Mapping[str, np.ndarray]:
    if tensors is None:
        return {}
    state = torch_files.state_dict(path, tensors, f"its `{key}` is not a dictionary of tensors, unlike in JiT's files")
    if unknown := [name for name in state if not name.startswith(PREFIX)]:
        raise UserError(
            f"{path}: `{key}` has tensors of an unknown network: {len(unknown)} ({listed(unknown)}); known: {PREFIX}*"
        )
    return torch_files.tensors(path, {name.removeprefix(PREFIX): tensor for name, tensor in state.items()})


def write_jit(path: str | os.PathLike[str], checkpoint: Checkpoint) -> None:
    """Write a checkpoint in the layout of JiT's files, without an optimizer state; whole or not at all.

    Raises:
        UserError: PyTorch isn't installed.
    """
    content: dict[str, Any] = {
        key: {PREFIX + name: array for name, array in getattr(checkpoint, part).items()}
        for part, key in ENTRIES.items()
    }
    torch_files.write_pickled(path, {**content, "epoch": checkpoint.epoch})
