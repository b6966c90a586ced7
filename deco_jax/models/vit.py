"""What frozen vision transformers have in common: blocks, their sharding rules, their FLOPs, their official names.

Source: Dosovitskiy et al. 2020 (ViT), with the options of DINOv2, DINOv3 and SigLIP2. Inference only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from deco_jax.convert.mapping import VECTOR, Row, Transform, fused, one_to_one
from deco_jax.models.layers import Dtype, LayerNorm, Linear
from deco_jax.models.network import FrozenNetwork, Network, Params

# ImageNet's, of images in [0, 1].
MEAN = np.array([0.485, 0.456, 0.406], np.float32)
STD = np.array([0.229, 0.224, 0.225], np.float32)

# How their parameters are split, see `run.sharding`.
RULES = (
    (r"teacher/(blocks|head)/(attention/)?(qkv|mlp_in)/kernel$", -2),
    (r"teacher/((blocks|head)/(attention/out|out|mlp_out)/kernel|positions|patch_embed/kernel)$", -1),
    (r"teacher/(register_tokens|head/probe)$", None),
)


class BlockStyle(NamedTuple):
    """How a block differs from a plain one.

    mlp_hidden: hidden units; 0: four times the width.
    gated: silu(gate) · up instead of a GELU; both halves are `mlp_in`'s outputs, the gate first.
    tanh: the GELU's approximation by tanh.
    layer_scale: whether what a branch adds is scaled, channel by channel.
    epsilon: of the layer norms.
    qkv_bias: whether queries, keys and values have biases.
    """

    mlp_hidden: int = 0
    gated: bool = False
    tanh: bool = False
    layer_scale: bool = True
    epsilon: float = 1e-6
    qkv_bias: bool = True


PLAIN = BlockStyle()


class Attention(nnx.Module):
    """Multi-head self-attention; `qkv_bias` as of `BlockStyle`."""

    def __init__(self, width: int, num_heads: int, qkv_bias: bool = True, *, dtype: Dtype, rngs: nnx.Rngs) -> None:
        self.num_heads = num_heads
        self.qkv = Linear(width, 3 * width, use_bias=qkv_bias, dtype=dtype, rngs=rngs)
        self.out = Linear(width, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, turn: Callable[[jax.Array], jax.Array] | None = None) -> jax.Array:
        """x [batch, tokens, width] → its shape.

        Args:
            turn: of queries and keys [batch, tokens, heads, head_width], for a rotary embedding.
        """
        q, k, v = self.qkv.to_heads(x, self.num_heads, 3)
        if turn is not None:
            q, k = turn(q), turn(k)
        return self.out.from_heads(jax.nn.dot_product_attention(q, k, v))


class Block(nnx.Module):
    """h += scale₁·Attention(LN(h)); h += scale₂·MLP(LN(h))."""

    def __init__(self, width: int, num_heads: int, style: BlockStyle = PLAIN, *, dtype: Dtype, rngs: nnx.Rngs) -> None:
        self.style, hidden = style, style.mlp_hidden or 4 * width
        self.norm1, self.norm2 = (LayerNorm(width, epsilon=style.epsilon) for _ in range(2))
        self.attention = Attention(width, num_heads, style.qkv_bias, dtype=dtype, rngs=rngs)
        self.mlp_in = Linear(width, (1 + style.gated) * hidden, dtype=dtype, rngs=rngs)
        self.mlp_out = Linear(hidden, width, dtype=dtype, rngs=rngs)
        if style.layer_scale:
            self.scale1, self.scale2 = nnx.Param(jnp.ones(width)), nnx.Param(jnp.ones(width))

    def __call__(self, h: jax.Array, turn: Callable[[jax.Array], jax.Array] | None = None) -> jax.Array:
        """h [batch, tokens, width] → the same shape and dtype; `turn` as of `Attention`."""
        attended = self.attention(self.norm1(h), turn)
        h = h + (self.scale1[...].astype(h.dtype) * attended if self.style.layer_scale else attended)
        out = self.mlp(self.norm2(h))
        return h + (self.scale2[...].astype(h.dtype) * out if self.style.layer_scale else out)

    def mlp(self, x: jax.Array) -> jax.Array:
        hidden = self.mlp_in(x)
        if self.style.gated:
            gate, up = jnp.split(hidden, 2, axis=-1)
            return self.mlp_out(jax.nn.silu(gate) * up)
        return self.mlp_out(jax.nn.gelu(hidden, approximate=self.style.tanh))


def unit_interval(images: jax.Array) -> jax.Array:
    """Return uint8 images, or such in [0, 1], as float32 in [0, 1]."""
    x = images.astype(jnp.float32)
    return x / 255 if images.dtype == jnp.uint8 else x


def with_first(tokens: jax.Array, *first: jax.Array) -> jax.Array:
    """Put vectors [width] or [count, width] in front of tokens [batch, tokens, width], in their dtype."""
    rows = jnp.concatenate([array.reshape(-1, array.shape[-1]).astype(tokens.dtype) for array in first])
    return jnp.concatenate([jnp.broadcast_to(rows, (len(tokens), *rows.shape)), tokens], axis=1)


def frozen(
    network: Network, dtype: Any, patch_size: int, load: Callable[[Any], Params], flops: Callable[[int, int], float]
) -> FrozenNetwork:
    """Return a module (images, patch_size) → `View` as a teacher whose kernels are kept in `dtype`.

    Args:
        load: (dtype of the kernels) → parameters.
        flops: (height, width) → FLOPs on one image of so many pixels.
    """

    def kept(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, dtype if path[-1].key == "kernel" else jnp.float32)

    return FrozenNetwork(
        lambda params, images: network.apply(params, images, patch_size),
        jax.tree_util.tree_map_with_path(kept, network.shapes),
        lambda: load(dtype),
        flops,
    )


def kernel_dtype(dtype: Any) -> Callable[[str], Any]:
    """Return `mapping.to_ours`'s dtypes: kernels in `dtype`, everything else float32."""
    return lambda path: dtype if path.endswith(".kernel") else np.float32


def flops(width: int, depth: int, patches: int, more_tokens: int, patch: int, style: BlockStyle = PLAIN) -> float:
    """Count the FLOPs of a forward pass on one image.

    Args:
        patches, more_tokens: tokens of the image, and others such as the class token.
        patch: side of a patch in pixels.
    """
    tokens, hidden = patches + more_tokens, style.mlp_hidden or 4 * width
    block = tokens * (4 * width**2 + (2 + style.gated) * width * hidden) + 2 * tokens**2 * width
    return 2.0 * (patches * 3 * patch**2 * width + depth * block)


# ---------------------------------------------------------------------------------------- the official weights


def convolution(patch: int) -> Transform:
    """[width, channel, row, column] to [(row, column, channel), width]."""
    return one_to_one(
        "a convolution over patches",
        4,
        lambda w: w.transpose(2, 3, 1, 0).reshape(patch * patch * 3, len(w)),
        lambda k: k.reshape(patch, patch, 3, k.shape[1]).transpose(3, 2, 0, 1),
    )


FIRST = one_to_one("[1, 1, width] to [width]", 3, lambda a: a.reshape(a.shape[2]), lambda a: a[None, None])


def norm_rows(torch: str, ours: str, **blocks: Any) -> list[Row]:
    """Return the rows of a layer norm's scale and bias."""
    return [
        Row(f"{torch}.weight", f"{ours}.scale", VECTOR, **blocks),
        Row(f"{torch}.bias", f"{ours}.bias", VECTOR, **blocks),
    ]


def joined_rows(torch: Sequence[str], ours: str, **blocks: Any) -> list[Row]:
    """Return the rows of several Linears, which are one here."""
    return [
        Row(tuple(f"{name}.weight" for name in torch), f"{ours}.kernel", fused(len(torch)), **blocks),
        Row(tuple(f"{name}.bias" for name in torch), f"{ours}.bias", fused(len(torch), bias=True), **blocks),
    ]
