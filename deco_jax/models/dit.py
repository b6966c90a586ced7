"""The diffusion transformer by itself, the baseline: the trunk and one Linear to a patch's pixels.

Source: DiT (Peebles & Xie 2023), as the paper's Table 1 has it (arXiv 2511.19365).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from deco_jax.convert.mapping import Row
from deco_jax.models.architecture import Architecture
from deco_jax.models.layers import Dtype, Linear, modulate, normalize, unpatchify, zeros
from deco_jax.models.official_names import linear_rows, patch_out, patch_out_bias, trunk_rows
from deco_jax.models.trunk import RULES, Trunk, TrunkSettings, trunk_flops
from deco_jax.shapes import Images


class FinalLayer(nnx.Module):
    """A transformer's head: a modulated norm and one Linear to a patch's pixels, zero at first.

    Args:
        norm: a module; None: a layer norm without parameters, as the baseline has it.
    """

    def __init__(
        self, width: int, patch_size: int, *, norm: nnx.Module | None = None, dtype: Dtype, rngs: nnx.Rngs
    ) -> None:
        self.norm = norm
        self.modulation = Linear(width, 2 * width, kernel_init=zeros, bias_init=zeros, dtype=dtype, rngs=rngs)
        self.linear = Linear(width, 3 * patch_size**2, kernel_init=zeros, bias_init=zeros, dtype=dtype, rngs=rngs)

    def __call__(self, h: jax.Array, condition: jax.Array) -> jax.Array:
        shift, scale = jnp.split(self.modulation(condition)[:, None], 2, axis=-1)
        norm = normalize if self.norm is None else self.norm
        return self.linear(modulate(norm(h), shift, scale))


class DiT(Trunk):
    """The baseline of the paper's Table 1: one transformer predicts every pixel of a patch.

    With x-prediction (config.model.prediction = "x") it is JiT.
    """

    def __init__(self, *, rngs: nnx.Rngs, **trunk: Any) -> None:
        super().__init__(**trunk, rngs=rngs)
        self.output = self.make_head(rngs)
        if self.mean_velocity:
            self.velocity_output = self.make_head(rngs)

    def make_head(self, rngs: nnx.Rngs) -> FinalLayer:
        """Make what turns the last hidden states into pixels."""
        return FinalLayer(self.width, self.patch_size, dtype=self.dtype, rngs=rngs)

    def head(
        self, images: Images, h: jax.Array, time: jax.Array, condition: jax.Array, second: bool = False
    ) -> tuple[jax.Array, jax.Array]:
        output = self.velocity_output if second else self.output
        patches = output(h, condition).astype(jnp.float32)
        patches = patches.reshape(*patches.shape[:2], self.patch_size**2, 3)
        return unpatchify(patches, self.patch_size, *images.shape[1:3]), h


def flops(model: Mapping[str, Any], height: int, width: int) -> dict[str, float]:
    """Count the multiply-adds of a forward pass of DiT on one image, by part."""
    head = 2 * model["width"] ** 2 + height * width * model["width"] * 3
    return trunk_flops(model, height, width) | {"head": head}


def table(model: Mapping[str, Any]) -> list[Row]:
    """Return the rows of the official baseline's checkpoints."""
    return [
        *trunk_rows(model, "x_embedder.proj"),
        *linear_rows("final_layer.adaLN_modulation.0", "output.modulation"),
        Row("final_layer.linear.weight", "output.linear.kernel", patch_out(model["patch_size"])),
        Row("final_layer.linear.bias", "output.linear.bias", patch_out_bias(model["patch_size"])),
    ]


ARCHITECTURE = Architecture(DiT, TrunkSettings, flops, RULES, table)
