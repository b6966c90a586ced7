"""What networks may know about the devices they run on; `run.sharding`, which knows the networks, has the rest."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

_platform: contextvars.ContextVar[str | None] = contextvars.ContextVar("platform", default=None)


@contextlib.contextmanager
def compiling_for(platform: str | None) -> Iterator[None]:
    """Make `on_tpu` answer for this platform while tracing in here; None: the default platform."""
    token = _platform.set(platform)
    try:
        yield
    finally:
        _platform.reset(token)


def on_tpu() -> bool:
    """Return whether the program being traced is for TPUs.

    TPUs prefer other forms of the same sums than CPUs and GPUs do: products with constant matrices instead of moves
    within a register's 128 lanes, and no arrays narrower than those.
    """
    return (_platform.get() or jax.default_backend()) == "tpu"


def gather(parameter: jax.Array, shape: Sequence[int], dtype: Any = None) -> jax.Array:
    """Return the whole parameter of which this device holds a part; a parameter that is already whole stays unchanged.

    The derivative is the sum of the devices' gradients over "fsdp", of which each device gets its part.

    Args:
        parameter: has the dimensions of `shape`, except for the axis that is split.
        dtype: in which it is used; it is cast before it travels.
    """
    split = [axis for axis, (held, whole) in enumerate(zip(parameter.shape, shape, strict=True)) if held != whole]
    if not split:
        return parameter
    (axis,) = split
    return jax.lax.all_gather(parameter if dtype is None else parameter.astype(dtype), "fsdp", axis=axis, tiled=True)


def place(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """Place an array that every host has in full; each host provides its own devices' parts."""
    return jax.make_array_from_callback(array.shape, sharding, array.__getitem__)
