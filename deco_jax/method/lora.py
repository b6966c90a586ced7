"""Low-rank adaptation: a pretrained denoiser stays frozen, and low-rank factors for its matrices are trained.

    W + (α / r) · A · B     W [depth, in, out] frozen, A [depth, in, r], B [depth, r, out], separate for each block

A is initialised from a normal distribution with variance 1 / in and B with zeros, so the adapted network starts as the
pretrained one. The optimizer, the averages and the checkpoints of a run only hold the trained parameters: {path of W:
{"a", "b"}} and the parts that are trained in full. `Adapter.merge` makes the network's parameters from them, in the
step, in samplers and when a checkpoint is read. Under `sharding.each_device` it works on parts: the factor with the
axis along which W is split is also split.

Source: Hu et al. 2021 (arXiv 2106.09685), §4.1.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from deco_jax.errors import UserError
from deco_jax.models.network import Network, Params
from deco_jax.schema import Rule, above, at_least, setting

BASE = "base"  # the frozen parameters among a step's frozen arrays
STACKS = ("blocks", "text_blocks")
MATRICES = ("qkv", "text_kv", "out", "gate", "up", "down", "modulation")
A, B = "a", "b"


def _some_of(text: str) -> bool:
    return bool(text) and set(text.split(",")) <= set(MATRICES)


@dataclasses.dataclass(frozen=True)
class LoraSettings:
    """Low-rank adaptation: config.init_from stays frozen, small factors are trained."""

    rank: int = setting(0, "Columns of the factors; 0: off, train the whole model.", at_least(0, 4096))
    alpha: float = setting(16.0, "The product of the factors is scaled by alpha / rank.", above(0, 1e6))
    matrices: str = setting(
        "qkv,text_kv,out,gate,up,down",
        "Comma-separated matrices of the transformer's blocks that get factors; those that it lacks are ignored.",
        Rule(_some_of, f"some of {', '.join(MATRICES)}, comma separated"),
    )
    whole: str = setting(
        "", "Comma-separated parts of the model that are also trained, in full, such as label_embed,decoder."
    )
    random_base: bool = setting(False, "Adapt random weights instead of those of config.init_from, to try the program.")


@dataclasses.dataclass(frozen=True)
class Adapter:
    """Which parameters of a denoiser are adapted, and how.

    Attributes:
        matrices: names of the adapted matrices in the transformer's blocks.
        whole: top-level names of parameters that are trained in full.
    """

    rank: int
    alpha: float
    matrices: tuple[str, ...]
    whole: tuple[str, ...] = ()

    def trained_shapes(self, shapes: Params) -> Params:
        """Return the shapes of the trained parameters, for a network with these shapes.

        Raises:
            UserError: the model has none of the matrices, or lacks a part that should be trained in full.
        """
        if unknown := [name for name in self.whole if name not in shapes or name in STACKS]:
            known = ", ".join(name for name in shapes if name not in STACKS)
            raise UserError(f"config.lora.whole={unknown[0]} is not a part of this model; choose from {known}")
        found = self._trained(shapes, ())
        if not any(name in STACKS for name in found):
            raise UserError(f"this model has no matrices {', '.join(self.matrices)}; change config.lora.matrices")
        return found

    def _trained(self, shapes: Mapping[str, Any], path: tuple[str, ...]) -> Params:
        found: Params = {}
        for name, leaf in shapes.items():
            here = (*path, name)
            if len(here) == 1 and name in self.whole:
                found[name] = leaf
            elif isinstance(leaf, Mapping):
                found |= {name: inner} if (inner := self._trained(leaf, here)) else {}
            elif here[0] in STACKS and name == "kernel" and path[-1] in self.matrices:
                *stack, fan_in, fan_out = leaf.shape
                sides = {A: (*stack, fan_in, self.rank), B: (*stack, self.rank, fan_out)}
                found[name] = {side: jax.ShapeDtypeStruct(shape, leaf.dtype) for side, shape in sides.items()}
        return found

    def base_shapes(self, shapes: Params) -> Params:
        """Return the shapes of the frozen parameters, for a network with these shapes."""
        return {name: leaf for name, leaf in shapes.items() if name not in self.whole}

    def init(self, key: jax.Array, network: Network) -> Params:
        """Initialise the trained parameters; merged with frozen parameters, they leave those matrices unchanged."""
        shapes, drawn = self.trained_shapes(network.shapes), network.init(key) if self.whole else {}
        leaves, treedef = jax.tree_util.tree_flatten_with_path(shapes)
        keys = jax.random.split(jax.random.fold_in(key, 1), len(leaves))

        def start(path: tuple[Any, ...], leaf: Any, key: jax.Array) -> jax.Array:
            if path[0].key in self.whole:
                value = drawn
                for part in path:
                    value = value[part.key]
                return value  # type: ignore[return-value]
            if path[-1].key == B:
                return jnp.zeros(leaf.shape, leaf.dtype)
            return jax.random.normal(key, leaf.shape, leaf.dtype) / math.sqrt(leaf.shape[-2])

        values = [start(path, leaf, key) for (path, leaf), key in zip(leaves, keys, strict=True)]
        return jax.tree_util.tree_unflatten(treedef, values)

    def merge(self, base: Any, trained: Any) -> Any:
        """Merge frozen and trained parameters into the network's, either whole or the parts that a device holds."""
        if not isinstance(trained, Mapping):
            return trained
        if trained.keys() == {A, B}:
            product = jnp.matmul(trained[A], trained[B], precision="highest")
            return base + (self.alpha / self.rank) * product
        merged = {name: self.merge((base or {}).get(name), inner) for name, inner in trained.items()}
        return {**(base or {}), **merged}

    def network(self, network: Network) -> Network:
        """Return the network with `init` and `shapes` of the trained parameters; `apply` still takes merged ones."""
        return network._replace(init=lambda key: self.init(key, network), shapes=self.trained_shapes(network.shapes))


def adapter_of(config: ml_collections.ConfigDict | Mapping[str, Any]) -> Adapter | None:
    """Read config.lora; None if it is off, or the config is from before it existed."""
    lora = config.get("lora") or {}
    if not lora.get("rank"):
        return None
    whole = tuple(filter(None, (part.strip() for part in lora["whole"].split(","))))
    return Adapter(lora["rank"], lora["alpha"], tuple(lora["matrices"].split(",")), whole)


def adapted(config: ml_collections.ConfigDict, network: Network) -> Network:
    """Return the denoiser as it is trained: `network` itself, or the part of it that config.lora trains."""
    adapter = adapter_of(config)
    return network if adapter is None else adapter.network(network)


def with_base(config: ml_collections.ConfigDict, objective: Callable[..., Any]) -> Callable[..., Any]:
    """Return `Method.objective`, or `groups`, as a function of the trained parameters if config.lora is on."""
    adapter = adapter_of(config)
    if adapter is None:
        return objective

    def of_trained(
        params: Params, pixels: Any, draws: Any, observed: Any, frozen: Mapping[str, Any], *more: Any
    ) -> Any:
        merged = adapter.merge(frozen[BASE], params["denoiser"])
        return objective({**params, "denoiser": merged}, pixels, draws, observed, frozen, *more)

    return of_trained


def rules(of_networks: tuple[tuple[str, int | None], ...]) -> tuple[tuple[str, int | None], ...]:
    """Return sharding rules for the factors, from those of the networks' matrices: see `run.sharding`."""
    found: list[tuple[str, int | None]] = []
    for pattern, axis in of_networks:
        if pattern.endswith("kernel$"):
            stem = pattern.removesuffix("$")
            found += [(f"{stem}/{A}$", -2 if axis == -2 else None), (f"{stem}/{B}$", -1 if axis == -1 else None)]
    return tuple(found)
