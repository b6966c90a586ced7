"""A model by its config, as a pair of pure functions over plain dictionaries of arrays.

The training step, samplers and checkpoints see `init` and `apply` and nested dictionaries; Flax stays inside.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from deco_jax.models.deco import DeCo
from deco_jax.models.dit import DiT
from deco_jax.models.pixnerd import PixNerd

MODELS: dict[str, Callable[..., nnx.Module]] = {"deco": DeCo, "dit": DiT, "pixnerd": PixNerd}

Params = dict[str, Any]


class Network(NamedTuple):
    """init(key) → params; apply(params, *inputs) → whatever the module returns; shapes: params as ShapeDtypeStructs."""

    init: Callable[[jax.Array], Params]
    apply: Callable[..., Any]
    shapes: Params

    @property
    def num_params(self) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(self.shapes))


def functional(make: Callable[[nnx.Rngs], nnx.Module]) -> Network:
    """Split a module into pure functions; `make` is called abstractly once and again inside `init`."""

    def init(key: jax.Array) -> Params:
        return nnx.to_pure_dict(nnx.state(make(nnx.Rngs(params=key)), nnx.Param))

    abstract = nnx.eval_shape(lambda: make(nnx.Rngs(params=0)))
    graphdef, state = nnx.split(abstract, nnx.Param)
    shapes = nnx.to_pure_dict(state)

    def apply(params: Params, *inputs: Any, **options: Any) -> Any:
        filled = jax.tree.map(lambda leaf: leaf, state)  # a fresh container: replacing writes into it
        nnx.replace_by_pure_dict(filled, params)
        return nnx.merge(graphdef, filled)(*inputs, **options)

    return Network(init, apply, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), shapes))


def build(model: Mapping[str, Any], devices: int = 1) -> Network:
    """The network of `config.model`.

    Args:
        model: `name` picks the class; `prediction` belongs to the loss and samplers; every other entry is an
            argument of the class, so an unknown one is a TypeError.
        devices: that it runs on. With several, decoder_chunk is 0: a chunk is cut out of the whole batch, which each
            device would then hold and work through.
    """
    arguments = {key: value for key, value in dict(model).items() if key not in ("name", "prediction")}
    if devices > 1 and "decoder_chunk" in arguments:
        arguments["decoder_chunk"] = 0
    arguments["dtype"] = jnp.dtype(arguments["dtype"])
    return functional(lambda rngs: MODELS[model["name"]](**arguments, rngs=rngs))
