"""PixNerd, a baseline of the paper's Table 1: each patch gets the weights of its own small pixel network.

Source: PixNerd (arXiv 2507.23268) as trained by DeCo's authors for Table 1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from deco_jax.convert.mapping import VECTOR, Row
from deco_jax.models.architecture import Architecture
from deco_jax.models.decoder import POSITION_FEATURES, cosine_basis, embed_pixels
from deco_jax.models.layers import Dtype, Linear, RMSNorm, patchify, run_stack, stack, unpatchify, zeros
from deco_jax.models.official_names import linear_rows, trunk_rows
from deco_jax.models.trunk import RULES, Trunk, TrunkSettings, trunk_flops
from deco_jax.schema import at_least, setting
from deco_jax.shapes import Images


def unit_columns(weights: jax.Array, floor: float = 1e-12) -> jax.Array:
    """Divide weights [..., inputs, outputs] by their length over the inputs, in float32."""
    w = weights.astype(jnp.float32)
    # The floor stands inside the root so that an all-zero column has a gradient.
    return (w * jax.lax.rsqrt(jnp.maximum(jnp.sum(w * w, axis=-2, keepdims=True), floor**2))).astype(weights.dtype)


class GeneratedBlock(nnx.Module):
    """h += silu(RMSNorm(h)·W₁)·W₂ with W₁ [width, ratio·width], W₂ [ratio·width, width] drawn from the patch."""

    def __init__(self, model_width: int, width: int, ratio: int, *, dtype: Dtype, rngs: nnx.Rngs) -> None:
        self.width, self.ratio = width, ratio
        self.generator = Linear(model_width, 2 * ratio * width**2, dtype=dtype, rngs=rngs)
        self.norm = RMSNorm(width)

    def __call__(self, h: jax.Array, features: jax.Array) -> jax.Array:
        """h [batch, tokens, patch², width], features [batch, tokens, model_width] → h's shape."""
        w1, w2 = jnp.split(self.generator(features), 2, axis=-1)
        w1 = unit_columns(w1.reshape(*features.shape[:2], self.width, self.ratio * self.width))
        w2 = unit_columns(w2.reshape(*features.shape[:2], self.ratio * self.width, self.width))
        return h + jax.nn.silu(self.norm(h) @ w1) @ w2


class GeneratedDecoder(nnx.Module):
    """PixNerd's head: pixel embedding, generated blocks, RMSNorm, Linear to RGB (zero at first)."""

    def __init__(
        self,
        model_width: int,
        *,
        width: int,
        depth: int,
        ratio: int,
        patch_size: int,
        dtype: Dtype,
        remat: str,
        rngs: nnx.Rngs,
    ) -> None:
        self.depth, self.patch_size, self.dtype, self.remat = depth, patch_size, dtype, remat
        self.pixel_embed = Linear(3 + POSITION_FEATURES, width, dtype=dtype, rngs=rngs)
        self.blocks = stack(lambda rngs: GeneratedBlock(model_width, width, ratio, dtype=dtype, rngs=rngs), depth, rngs)
        self.norm = RMSNorm(width)
        self.output = Linear(width, 3, kernel_init=zeros, bias_init=zeros, dtype=dtype, rngs=rngs)

    def __call__(self, images: jax.Array, features: jax.Array) -> jax.Array:
        """images [batch, height, width, 3], features [batch, tokens, model_width] → float32, images' shape."""
        h = embed_pixels(patchify(images, self.patch_size), cosine_basis(self.patch_size), self.pixel_embed)
        h = run_stack(
            self.blocks, h, lambda block, h: block(h, features), dtype=self.dtype, remat=self.remat, unroll=self.depth
        )
        pixels = self.output(self.norm(h)).astype(jnp.float32)
        return unpatchify(pixels, self.patch_size, *images.shape[1:3])


@dataclasses.dataclass(frozen=True)
class PixNerdSettings(TrunkSettings):
    """The settings of PixNerd."""

    decoder_width: int = setting(64, "Channels of the pixel network.", at_least(1, 1024))
    decoder_depth: int = setting(2, "Blocks of the pixel network.", at_least(1, 256))
    decoder_ratio: int = setting(2, "Hidden units of a block, as a multiple of its width.", at_least(1, 64))


class PixNerd(Trunk):
    """Args: decoder_width, decoder_depth, decoder_ratio (hidden / width) of the generated blocks; see `trunk.Trunk`."""

    def __init__(
        self, *, decoder_width: int, decoder_depth: int, decoder_ratio: int, rngs: nnx.Rngs, **trunk: Any
    ) -> None:
        super().__init__(**trunk, rngs=rngs)
        options: dict[str, Any] = {
            "width": decoder_width,
            "depth": decoder_depth,
            "ratio": decoder_ratio,
            "patch_size": self.patch_size,
            "dtype": self.dtype,
            "remat": self.remat,
        }
        self.decoder = GeneratedDecoder(self.width, **options, rngs=rngs)
        if self.mean_velocity:
            self.velocity_decoder = GeneratedDecoder(self.width, **options, rngs=rngs)

    def head(
        self, images: Images, h: jax.Array, time: jax.Array, condition: jax.Array, second: bool = False
    ) -> tuple[jax.Array, jax.Array]:
        features = jax.nn.silu(time[:, None] + h)
        decoder = self.velocity_decoder if second else self.decoder
        return decoder(images, features), features


def flops(model: Mapping[str, Any], height: int, width: int) -> dict[str, float]:
    """Count the multiply-adds of a forward pass on one image, by part."""
    inner, pixels, depth = model["decoder_width"], height * width, model["decoder_depth"]
    generated = 2 * model["decoder_ratio"] * inner**2
    return trunk_flops(model, height, width) | {
        "condition": depth * (pixels // model["patch_size"] ** 2) * model["width"] * generated,
        "pixel_embed": pixels * (3 + POSITION_FEATURES) * inner,
        "pixel_blocks": depth * pixels * generated,
        "pixel_output": pixels * inner * 3,
    }


def table(model: Mapping[str, Any]) -> list[Row]:
    """Return the rows of PixNerd's official checkpoints; its decoder blocks are numbered on from the trunk."""
    many = {"count": model["decoder_depth"], "first": model["depth"]}
    return [
        *trunk_rows(model, "s_embedder.proj"),
        *linear_rows("x_embedder.embedder.0", "decoder.pixel_embed"),
        *linear_rows("blocks.{i}.param_generator1.0", "decoder.blocks.generator", **many),
        Row("blocks.{i}.norm.weight", "decoder.blocks.norm.scale", VECTOR, **many),
        Row("final_layer.norm.weight", "decoder.norm.scale", VECTOR),
        *linear_rows("final_layer.linear", "decoder.output"),
    ]


ARCHITECTURE = Architecture(
    PixNerd,
    PixNerdSettings,
    flops,
    (
        (r"decoder/blocks/generator/kernel$", -1),
        (r"decoder/(pixel_embed|blocks/norm|norm|output)/", None),  # some kilobytes
        *RULES,
    ),
    table,
    "decoder/output/kernel",
)
