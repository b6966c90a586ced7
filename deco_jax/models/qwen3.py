"""Qwen3, the frozen language model whose last hidden states condition text-to-image models.

Source: Qwen3 technical report (Yang et al. 2025): a decoder-only transformer with RMSNorm, grouped-query
attention, normalised queries and keys, rotary positions and SwiGLU. Inference only, no cache.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.nn import initializers

from deco_jax.models.layers import Dtype, Linear, RMSNorm, SwiGLU, run_stack, stack


@dataclass(frozen=True)
class Sizes:
    """Qwen3-1.7B unless told otherwise; `convert.qwen3.read_sizes` reads them from a `config.json`."""

    vocabulary: int = 151936
    width: int = 2048
    mlp_hidden: int = 6144
    depth: int = 28
    num_heads: int = 16
    num_kv_heads: int = 8
    head_width: int = 128
    rope_theta: float = 1e6
    norm_epsilon: float = 1e-6


# How its parameters are split, see `run.sharding`.
RULES = (
    (r"encoder/blocks/.*(query|key|value|gate|up)/kernel$", -2),
    (r"encoder/(blocks/.*(out|down)/kernel|embed/embedding)$", -1),
)


class Attention(nnx.Module):
    """Causal grouped-query attention without biases; normalised, rotated queries and keys."""

    def __init__(self, sizes: Sizes, *, dtype: Dtype, rngs: nnx.Rngs) -> None:
        self.head_width = sizes.head_width
        inner, kv_inner = sizes.num_heads * sizes.head_width, sizes.num_kv_heads * sizes.head_width
        self.query = Linear(sizes.width, inner, use_bias=False, dtype=dtype, rngs=rngs)
        self.key = Linear(sizes.width, kv_inner, use_bias=False, dtype=dtype, rngs=rngs)
        self.value = Linear(sizes.width, kv_inner, use_bias=False, dtype=dtype, rngs=rngs)
        self.out = Linear(inner, sizes.width, use_bias=False, dtype=dtype, rngs=rngs)
        self.q_norm = RMSNorm(sizes.head_width, epsilon=sizes.norm_epsilon)
        self.k_norm = RMSNorm(sizes.head_width, epsilon=sizes.norm_epsilon)

    def __call__(self, x: jax.Array, angles: jax.Array, mask: jax.Array) -> jax.Array:
        """x [batch, length, width], angles [length, head_width / 2], mask [batch, length, length] → x's shape."""
        heads = (*x.shape[:2], -1, self.head_width)
        q = rotate_halves(self.q_norm(self.query(x).reshape(heads)), angles)
        k = rotate_halves(self.k_norm(self.key(x).reshape(heads)), angles)
        y = jax.nn.dot_product_attention(q, k, self.value(x).reshape(heads), mask=mask[:, None])
        # A query that may see nothing gets nothing (PyTorch's rule; the empty prompt is made of such queries).
        y = jnp.where(mask.any(axis=-1)[..., None, None], y, 0)
        return self.out(y.reshape(*x.shape[:2], -1))


class Block(nnx.Module):
    """h += Attention(norm(h)); h += SwiGLU(norm(h))."""

    def __init__(self, sizes: Sizes, *, dtype: Dtype, rngs: nnx.Rngs) -> None:
        self.norm1 = RMSNorm(sizes.width, epsilon=sizes.norm_epsilon)
        self.attention = Attention(sizes, dtype=dtype, rngs=rngs)
        self.norm2 = RMSNorm(sizes.width, epsilon=sizes.norm_epsilon)
        self.mlp = SwiGLU(sizes.width, sizes.mlp_hidden, dtype=dtype, rngs=rngs)

    def __call__(self, h: jax.Array, angles: jax.Array, mask: jax.Array) -> jax.Array:
        h = h + self.attention(self.norm1(h), angles, mask)
        return h + self.mlp(self.norm2(h))


class Qwen3(nnx.Module):
    """Token ids to the last hidden states.

    Args:
        sizes: of the network.
        dtype: compute dtype; norms, rotations and softmax are float32.
        frequency_dtype: what the rotary frequencies are rounded to; by default the compute dtype, because DeCo's
            models were trained on the features of an encoder that was cast to bfloat16 as a whole.
    """

    def __init__(
        self, sizes: Sizes, *, dtype: Dtype = jnp.float32, frequency_dtype: Dtype | None = None, rngs: nnx.Rngs
    ) -> None:
        self.sizes, self.dtype, self.frequency_dtype = sizes, dtype, frequency_dtype or dtype
        self.embed = nnx.Embed(sizes.vocabulary, sizes.width, embedding_init=initializers.normal(0.02), rngs=rngs)
        self.blocks = stack(lambda rngs: Block(sizes, dtype=dtype, rngs=rngs), sizes.depth, rngs)
        self.norm = RMSNorm(sizes.width, epsilon=sizes.norm_epsilon)

    @jax.named_scope("text_encoder")
    def __call__(self, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        """The states after the last norm, padding's too.

        Args:
            tokens: int32 [batch, length], padded on the right.
            mask: bool or int [batch, length]; true where there is text. A row may be all false: the empty prompt.

        Returns:
            [batch, length, width] in the compute dtype.
        """
        length = tokens.shape[1]
        # [batch, query, key]: keys up to the query that are no padding
        seen = jnp.tril(jnp.ones((length, length), bool)) & mask.astype(bool)[:, None, :]
        angles = jnp.asarray(rotary_angles(length, self.sizes.head_width, self.sizes.rope_theta, self.frequency_dtype))
        # Looked up before the cast: the table is the largest array here.
        h = jnp.asarray(self.embed.embedding[...])[tokens].astype(self.dtype)
        h = run_stack(self.blocks, h, lambda block, h: block(h, angles, seen), dtype=self.dtype)
        return self.norm(h)


def rotary_angles(length: int, head_width: int, theta: float, dtype: Dtype = jnp.float32) -> np.ndarray:
    """Return position · theta^(−2k / head_width), frequencies rounded to `dtype`: float32 [length, head_width / 2]."""
    frequencies = np.array([math.pow(theta, -2 * k / head_width) for k in range(head_width // 2)], np.float32)
    rounded = frequencies.astype(jnp.dtype(dtype)).astype(np.float32)
    return np.arange(length, dtype=np.float32)[:, None] * rounded


def rotate_halves(x: jax.Array, angles: jax.Array) -> jax.Array:
    """Turn the channel pairs (i, i + head_width / 2) of [batch, length, heads, head_width] by their angles."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)
