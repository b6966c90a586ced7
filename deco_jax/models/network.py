"""A model by its config, as a pair of pure functions over plain dictionaries of arrays.

The training step, samplers and checkpoints see `init` and `apply` and nested dictionaries; Flax stays inside.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from deco_jax.errors import UserError
from deco_jax.models import deco, dit, jit, pixnerd
from deco_jax.models.architecture import Architecture
from deco_jax.models.layers import gather_parameters, is_variable
from deco_jax.run import choices

MODELS: dict[str, Architecture] = {
    "deco": deco.ARCHITECTURE,
    "dit": dit.ARCHITECTURE,
    "pixnerd": pixnerd.ARCHITECTURE,
    "jit": jit.ARCHITECTURE,
}
# Each model's section of the config; see `deco_jax.schema`.
SETTINGS: dict[str, type] = {name: model.settings for name, model in MODELS.items()}

Params = dict[str, Any]

OUTPUT = ("prediction", "asymmetric_rank")  # settings of what a network's output stands for


class Network(NamedTuple):
    """A module as pure functions over its parameters.

    init: (key) → params
    apply: (params, *inputs) → whatever the module returns. Under `sharding.each_device` params are the parts that a
        device holds, and each is made whole where it is used.
    shapes: params as ShapeDtypeStructs
    whole: (params) → the same, all of them whole on this device in the dtype that they are used in: before a loop that
        applies the network often, where memory has room for it
    """

    init: Callable[[jax.Array], Params]
    apply: Callable[..., Any]
    shapes: Params
    whole: Callable[[Params], Params] = lambda params: params

    @property
    def num_params(self) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(self.shapes))


class View(NamedTuple):
    """What a teacher sees in images, float32.

    tokens: [batch, tokens, width], a vector for each of the denoiser's tokens, row by row.
    image: [batch, width], one for the whole image: the class token, or what takes its place.
    """

    tokens: jax.Array
    image: jax.Array


class FrozenNetwork(NamedTuple):
    """A network that doesn't train: a teacher, a text encoder.

    apply: (params, *inputs) → features; gradients pass to the inputs
    shapes: params as ShapeDtypeStructs, in the types that they are kept in
    load: () → params on the host; UserError, with where to get them, if their file is missing
    flops: of the forward pass on one image of (height, width) pixels, or on one text of so many tokens
    """

    apply: Callable[..., Any]
    shapes: Params
    load: Callable[[], Params]
    flops: Callable[..., float]


def functional(make: Callable[[nnx.Rngs], nnx.Module], dtype: Any = None) -> Network:
    """Split a module into pure functions; `make` is called abstractly once and again inside `init`.

    Args:
        dtype: that the module computes in. In float32 its products are float32 on every device, forwards and backwards:
            left to themselves GPUs take TensorFloat-32 for them, and TPUs bfloat16.
    """
    exact = dtype is not None and jnp.dtype(dtype) == jnp.float32

    def init(key: jax.Array) -> Params:
        return nnx.to_pure_dict(nnx.state(make(nnx.Rngs(params=key)), nnx.Param))

    abstract = nnx.eval_shape(lambda: make(nnx.Rngs(params=0)))
    for variable in jax.tree.leaves(abstract, is_leaf=is_variable):
        variable.set_metadata(whole_shape=tuple(variable.shape))
    graphdef, state = nnx.split(abstract, nnx.Param)
    shapes = nnx.to_pure_dict(state)

    def fill(params: Params) -> nnx.State:
        filled = jax.tree.map(lambda leaf: leaf, state)  # a fresh container: replacing writes into it
        nnx.replace_by_pure_dict(filled, params)
        return filled

    def apply(params: Params, *inputs: Any, **options: Any) -> Any:
        with jax.default_matmul_precision("highest") if exact else contextlib.nullcontext():
            return nnx.merge(graphdef, gather_parameters(fill(params), stacks=False))(*inputs, **options)

    def whole(params: Params) -> Params:
        return nnx.to_pure_dict(gather_parameters(fill(params), stacks=True))

    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), shapes)
    return Network(init, apply, shapes, whole)


def build(model: Mapping[str, Any]) -> Network:
    """Build the network of `config.model`.

    Args:
        model: `name` picks the class; those of OUTPUT belong to the loss and samplers; every other entry is an
            argument of the class, so an unknown one is a TypeError.
    """
    kind = architecture(model["name"])
    arguments = {key: value for key, value in dict(model).items() if key not in ("name", *OUTPUT)}
    arguments["dtype"] = jnp.dtype(arguments["dtype"])
    if "attention" in arguments:
        # Neither cuDNN's attention nor the kernel for TPUs has a forward-mode product, which MeanFlow takes.
        forwards = arguments.get("mean_velocity")
        head_width = arguments["width"] // arguments["num_heads"]
        chosen = choices.attention(arguments["attention"], arguments["dtype"], head_width, "cpu" if forwards else None)
        # Whether "auto" is the kernel for TPUs depends on what the program is compiled for.
        if forwards or chosen == "cudnn":
            arguments["attention"] = chosen
    if arguments.get("remat") == choices.AUTO:
        # Training has settled it by now, and without a gradient there is nothing to keep.
        arguments["remat"] = "none"
    return functional(lambda rngs: kind.module(**arguments, rngs=rngs), arguments["dtype"])


def architecture(name: str) -> Architecture:
    """Look a denoiser up by config.model.name. UserError if there is none of that name."""
    if name not in MODELS:
        raise UserError(f"config.model.name={name!r} is not a model; choose one of {', '.join(MODELS)}")
    return MODELS[name]
