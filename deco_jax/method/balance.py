"""The balance of the perceptual losses: gives them a gradient at the output layer as large as that of flow matching.

From a step on, every so many steps, the factor c of their weights becomes 0.8·c + 0.2·‖∇flow‖ / (‖∇perceptual‖ + 1e-4),
where both gradients are those of the output layer's kernel (PixelGen, arXiv 2602.02493). Only these steps have extra
work: another forward pass, and the backward pass of the losses and of that one layer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

NAME = "balance"  # the factor's name among the arrays that a run measures
KEPT, LIMIT, EPSILON = 0.8, 100.0, 1e-4

# Gradients of the two groups at the output layer's kernel: {"flow", "perceptual"}.
Gradients = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class Balance:
    """Changes the factor every `every` steps (counted from 1), from step `start` on; it is 1 at first."""

    start: int
    every: int

    @property
    def first(self) -> np.ndarray:
        return np.ones((), np.float32)

    def due(self, step: Array) -> Array:
        """Return whether the factor changes after a step."""
        return (step >= self.start) & (step % self.every == 0)

    def after(self, factor: Array, due: Array, gradients: Gradients) -> Array:
        """Return the factor for the next step, from gradients of the whole batch; unchanged if they aren't finite."""
        flow, perceptual = (jnp.linalg.norm(gradients[name].ravel()) for name in ("flow", "perceptual"))
        changed = KEPT * factor + (1 - KEPT) * jnp.clip(flow / (perceptual + EPSILON), 0, LIMIT)
        return jnp.where(due & jnp.isfinite(changed), changed, factor)


def output_gradients(
    groups: Callable[[dict[str, Any]], tuple[Array, Array]], params: Mapping[str, Any], path: str
) -> Gradients:
    """Return the gradients of two losses for one parameter of the denoiser.

    The losses are linearised in that parameter only, so nothing before it is differentiated.

    Args:
        groups: (params) → the losses "flow" and "perceptual", scalars.
        path: of the parameter in params["denoiser"], as "output/linear/kernel".
    """

    def of_kernel(kernel: Array) -> tuple[Array, Array]:
        return groups({**params, "denoiser": _replaced(params["denoiser"], path.split("/"), kernel)})

    losses, pull_back = jax.vjp(of_kernel, _found(params["denoiser"], path))
    one, zero = (jnp.full((), value, losses[0].dtype) for value in (1, 0))
    return {"flow": pull_back((one, zero))[0], "perceptual": pull_back((zero, one))[0]}


def zeros(params: Mapping[str, Any], path: str) -> Gradients:
    """Return placeholder gradients for a step that doesn't need them."""
    return dict.fromkeys(("flow", "perceptual"), jnp.zeros_like(_found(params["denoiser"], path)))


def placed_like(placed: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Return the PartitionSpecs of the gradients, from those of the parameters."""
    return dict.fromkeys(("flow", "perceptual"), _found(placed["denoiser"], path))


def _found(tree: Any, path: str) -> Any:
    for name in path.split("/"):
        tree = tree[name]
    return tree


def _replaced(tree: Mapping[str, Any], names: list[str], value: Any) -> dict[str, Any]:
    first, *rest = names
    return {**tree, first: _replaced(tree[first], rest, value) if rest else value}
