"""What a network may know of the devices that it runs on; `run.sharding` has the rest, which knows the networks."""

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
    """What is traced in here asks `on_tpu` about this platform; None: the default one."""
    token = _platform.set(platform)
    try:
        yield
    finally:
        _platform.reset(token)


def on_tpu() -> bool:
    """Whether the program that is being traced is for TPUs, which like other forms of the same sums than CPUs and GPUs:
    products with constant matrices instead of moves within a register's 128 lanes, and nothing narrower than those."""
    return (_platform.get() or jax.default_backend()) == "tpu"


def gather(parameter: jax.Array, shape: Sequence[int], dtype: Any = None) -> jax.Array:
    """The whole parameter of which this device holds a part; what is whole already is returned as it is.

    Its derivative is the sum of the devices' gradients over "fsdp", of which each device gets its part.

    Args:
        parameter: equal to `shape` but for one axis.
        dtype: that it is used in; it is cast before it travels.
    """
    split = [axis for axis, (held, whole) in enumerate(zip(parameter.shape, shape, strict=True)) if held != whole]
    if not split:
        return parameter
    (axis,) = split
    return jax.lax.all_gather(parameter if dtype is None else parameter.astype(dtype), "fsdp", axis=axis, tiled=True)


def place(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """An array that every host has all of, each giving its own devices' parts."""
    return jax.make_array_from_callback(array.shape, sharding, array.__getitem__)
