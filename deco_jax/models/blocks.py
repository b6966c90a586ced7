"""The blocks of the diffusion transformer: attention and a gated MLP, modulated by the condition.

Source: DiT (Peebles & Xie 2023), with RMSNorm, SwiGLU and two-dimensional RoPE as DeCo (arXiv 2511.19365) has them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from deco_jax.models import flash
from deco_jax.models.layers import Dtype, Linear, RMSNorm, SwiGLU, kept, modulate, rotate, xavier
from deco_jax.run.devices import on_tpu


class BlockStyle(NamedTuple):
    """How a transformer's blocks start and whether they have biases.

    kernel_init, bias_init: of all Linear layers; None: PyTorch's default.
    modulation_init: of the adaptive norm's Linear, kernel and bias; None: like the others.
    """

    use_bias: bool = False  # of q, k, v and the MLP; attention's output has one in any case
    kernel_init: Callable | None = None
    bias_init: Callable | None = None
    modulation_init: Callable | None = None


PLAIN = BlockStyle()


def cudnn_takes(head_width: int, *, hopper: bool = False) -> bool:
    """Return whether cuDNN's fused attention takes heads of this many channels; JAX refuses others.

    Args:
        hopper: on GPUs from Hopper on; otherwise on every GPU that has it.
    """
    return head_width % 8 == 0 and head_width <= (256 if hopper else 128)


class Dropout(NamedTuple):
    """Zeroes a share of the channels and scales up the others, for each example by its own key.

    rate: in [0, 1); keys: [batch].
    """

    rate: float
    keys: jax.Array

    def drop(self, x: jax.Array, place: int) -> jax.Array:
        """Drop from x [batch, ...]; `place` tells apart the places in a block."""
        keep = jax.vmap(lambda key: jax.random.bernoulli(jax.random.fold_in(key, place), 1 - self.rate, x.shape[1:]))
        return jnp.where(keep(self.keys), x / (1 - self.rate), 0).astype(x.dtype)


class Attention(nnx.Module):
    """Multi-head self-attention with normalised queries and keys; optionally also over a text.

    The text's keys and values are appended behind the image's; its keys share the image's key norm and
    are not rotated.

    Args:
        implementation: of XLA, cuDNN (GPU, bfloat16), or "auto": `flash` on TPUs and XLA's elsewhere.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        with_text: bool,
        implementation: Literal["auto", "xla", "cudnn"],
        style: BlockStyle = PLAIN,
        dtype: Dtype,
        rngs: nnx.Rngs,
    ) -> None:
        head_width = width // num_heads
        self.num_heads, self.implementation = num_heads, implementation
        start: dict[str, Any] = {"kernel_init": style.kernel_init, "bias_init": style.bias_init}
        self.qkv = Linear(width, 3 * width, use_bias=style.use_bias, **start, dtype=dtype, rngs=rngs)
        if with_text:
            self.text_kv = Linear(width, 2 * width, use_bias=False, dtype=dtype, rngs=rngs)
        self.q_norm, self.k_norm = RMSNorm(head_width), RMSNorm(head_width)
        self.out = Linear(width, width, **start, dtype=dtype, rngs=rngs)

    @jax.named_scope("attention")
    def __call__(self, x: jax.Array, angles: jax.Array | None, text: jax.Array | None = None) -> jax.Array:
        """x [batch, tokens, width], angles [tokens, head_width / 2], text [batch, length, width] → x's shape."""
        keys = x.shape[1] + (0 if text is None else text.shape[1])
        if self.implementation == "auto" and on_tpu() and flash.fits(x.shape[1], keys, x.shape[-1] // self.num_heads):
            return self.by_kernel(x, angles, text)
        q, k, v = (kept(part) for part in self.qkv.to_heads(x, self.num_heads, 3))
        q, k = self.q_norm(q), self.k_norm(k)
        if angles is not None:
            q, k = rotate(q, angles), rotate(k, angles)
        if text is not None:
            text_k, text_v = self.text_kv.to_heads(text, self.num_heads, 2)
            k = jnp.concatenate([k, self.k_norm(text_k)], axis=1)
            v = jnp.concatenate([v, text_v], axis=1)
        implementation: Literal["xla", "cudnn"] = "cudnn" if self.implementation == "cudnn" else "xla"
        mixed = jax.nn.dot_product_attention(q, k, v, implementation=implementation)
        return self.out.from_heads(kept(mixed))

    def by_kernel(self, x: jax.Array, angles: jax.Array | None, text: jax.Array | None) -> jax.Array:
        """Do the same by `flash.attention`, heads as [batch, heads, head_width, tokens]."""
        q, k, v = self.qkv.to_heads_down(x, self.num_heads, 3)
        if text is not None:
            text_k, text_v = self.text_kv.to_heads_down(text, self.num_heads, 2)
            k, v = jnp.concatenate([k, text_k], axis=-1), jnp.concatenate([v, text_v], axis=-1)
        if angles is None:
            angles = jnp.zeros((x.shape[1], q.shape[2] // 2))
        scales = (self.q_norm.scale[...], self.k_norm.scale[...])
        mixed = flash.attention(q, k, v, scales, flash.tables(angles, k.shape[-1]), epsilon=self.q_norm.epsilon)
        return self.out.from_heads_down(mixed)


class Block(nnx.Module):
    """h += gate₁·Attention(mod(norm(h))); h += gate₂·SwiGLU(mod(norm(h))), modulated by one Linear of the condition.

    The modulation starts like any Linear, not at zero: that is what the published weights were trained from.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        mlp_hidden: int,
        *,
        with_text: bool = False,
        attention: Literal["auto", "xla", "cudnn"] = "xla",
        style: BlockStyle = PLAIN,
        dtype: Dtype,
        rngs: nnx.Rngs,
    ) -> None:
        self.norm1, self.norm2 = RMSNorm(width), RMSNorm(width)
        self.attention = Attention(
            width, num_heads, with_text=with_text, implementation=attention, style=style, dtype=dtype, rngs=rngs
        )
        self.mlp = SwiGLU(
            width, mlp_hidden, use_bias=style.use_bias, xavier_init=style.kernel_init is xavier, dtype=dtype, rngs=rngs
        )
        start: dict[str, Any] = {"kernel_init": style.modulation_init, "bias_init": style.modulation_init}
        self.modulation = Linear(width, 6 * width, **start, dtype=dtype, rngs=rngs)

    @jax.named_scope("blocks")
    def __call__(
        self,
        h: jax.Array,
        condition: jax.Array,
        angles: jax.Array | None,
        text: jax.Array | None = None,
        dropout: Dropout | None = None,
    ) -> jax.Array:
        """h [batch, tokens, width], condition [batch, width] (already activated) → h's shape.

        Args:
            dropout: of attention's output and of the MLP's hidden units; None: nothing is dropped.
        """
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(self.modulation(condition)[:, None], 6, axis=-1)
        attended = kept(self.attention(modulate(self.norm1(h), shift1, scale1), angles, text))
        drop_hidden = None
        if dropout is not None:
            attended, drop_hidden = dropout.drop(attended, 0), functools.partial(dropout.drop, place=1)
        h = h + gate1 * attended
        return h + gate2 * kept(self.mlp(modulate(self.norm2(h), shift2, scale2), drop_hidden))


class TextEmbedding(nnx.Module):
    """RMSNorm(Linear(text)): [batch, length, text_width] → [batch, length, width]."""

    def __init__(self, text_width: int, width: int, *, dtype: Dtype, rngs: nnx.Rngs) -> None:
        self.proj = Linear(text_width, width, dtype=dtype, rngs=rngs)
        self.norm = RMSNorm(width)

    def __call__(self, text: jax.Array) -> jax.Array:
        return self.norm(self.proj(text))
