"""Everything a run carries from step to step, as nested dictionaries of arrays, sharded from the start.

step       int32, steps done
skipped    int32, consecutive steps with a non-finite loss or gradient, which changed nothing
params     {"denoiser": ..., "projector": ...}  (the projector only with REPA)
averages   {"ema": ..., other names: ...}, moving averages of the denoiser, which draw samples
measured   what the method measures on the data and depends on, by name; only if it does
opt_state  optax's
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from deco_jax.method.averages import EMA
from deco_jax.models.network import Network
from deco_jax.run.sharding import state_shardings

State = dict[str, Any]


def initial_state(
    key: jax.Array,
    networks: dict[str, Network],
    optimizer: optax.GradientTransformation,
    averages: Iterable[str] = (EMA,),
    measured: Mapping[str, Any] = MappingProxyType({}),
) -> State:
    """Return the state before the first step; each network is initialised from its own key.

    Args:
        measured: the initial values of `Method.measured`.
    """
    params = {name: network.init(jax.random.fold_in(key, i)) for i, (name, network) in enumerate(networks.items())}
    state = {
        "step": jnp.zeros((), jnp.int32),
        "skipped": jnp.zeros((), jnp.int32),
        "params": params,
        # Copies, because donated buffers must not be shared.
        "averages": {name: jax.tree.map(jnp.copy, params["denoiser"]) for name in averages},
        "opt_state": optimizer.init(params),
    }
    if measured:
        state["measured"] = {name: jnp.asarray(value) for name, value in measured.items()}
    return state


def state_shapes(
    networks: dict[str, Network],
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    averages: Iterable[str] = (EMA,),
    measured: Mapping[str, Any] = MappingProxyType({}),
) -> State:
    """Return the whole state as ShapeDtypeStructs with shardings; nothing is allocated."""
    shapes = jax.eval_shape(lambda key: initial_state(key, networks, optimizer, averages, measured), jax.random.key(0))
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        state_shardings(mesh, shapes),
    )


def create_state(
    seed: int,
    networks: dict[str, Network],
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    averages: Iterable[str] = (EMA,),
    measured: Mapping[str, Any] = MappingProxyType({}),
) -> State:
    """Create a new state, each leaf in its place, so that no device ever holds all of it."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state_shapes(networks, optimizer, mesh, averages, measured))
    make = jax.jit(lambda key: initial_state(key, networks, optimizer, averages, measured), out_shardings=shardings)
    return make(jax.random.key(seed))
