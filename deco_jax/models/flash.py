"""Attention for TPUs whose scores never leave the fast memory, written by hand in Pallas.

XLA writes the scores of all heads to memory, or computes queries · keys anew for each of softmax's passes. Here one
program of the grid has some heads of one example, their keys and values whole, and takes the queries by blocks; norms
and rotary embedding of queries and keys are part of it. Channels lie along the sublanes and tokens along the lanes,
[channels, tokens]: heads of 72 channels then fill the registers, and softmax's sums are sums of registers. The
backward pass computes the scores again from the saved sums (Dao et al. 2022, arXiv 2205.14135, algorithm 4).
"""

from __future__ import annotations

import functools
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES, SUBLANES = 128, 8
BLOCK = 512  # queries at a time, at most
HEADS = 2  # in a program of the grid, at BLOCK tokens
SCORES = 2**20  # of a block at most, 4 MB in float32
# Of examples, and of the groups of heads, which add to one sum.
ORDER: tuple[Literal["parallel"], Literal["arbitrary"]] = ("parallel", "arbitrary")
MEMORY = 64 * 2**20  # bytes of the fast memory that a kernel may take


# Cycles of a TPU for a pair of query and key, and for a token, of a head, forwards and backwards. Not measured: the
# bundles that the compiler schedules for v5e at 256 and at 1024 tokens of 72 channels, two points for two numbers.
FORWARD_CYCLES = (0.0030, 1.24)
BACKWARD_CYCLES = (0.0064, 1.43)


class Options(NamedTuple):
    """What is fixed when a kernel is compiled."""

    epsilon: float
    heads: int  # in a program of the grid
    block: int  # queries at a time


def fits(tokens: int, keys: int, head_width: int) -> bool:
    """Say whether the kernels take these sizes."""
    return head_width % SUBLANES == 0 and query_block(tokens, keys) > 0


def query_block(tokens: int, keys: int) -> int:
    """Return how many queries are taken at a time; 0 if there is no such block."""
    sizes = [n for n in (BLOCK, 256, 128) if tokens % n == 0 and n * keys <= SCORES]
    if sizes:
        return sizes[0]
    return tokens if tokens * keys <= SCORES else 0


def tables(angles: jax.Array | np.ndarray, keys: int) -> tuple[jax.Array, jax.Array]:
    """Return the cosines and signed sines [head_width, keys] of rotary angles [tokens, head_width / 2].

    Keys behind the last token are not rotated.
    """
    wide = jnp.repeat(jnp.asarray(angles, jnp.float32), 2, axis=-1).T
    signs = np.where(np.arange(len(wide)) % 2, 1.0, -1.0).astype(np.float32)[:, None]
    rest = ((0, 0), (0, keys - wide.shape[1]))
    return jnp.pad(jnp.cos(wide), rest, constant_values=1.0), jnp.pad(jnp.sin(wide) * signs, rest)


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    scales: tuple[jax.Array, jax.Array],
    rotation: tuple[jax.Array, jax.Array],
    *,
    epsilon: float,
) -> jax.Array:
    """Return softmax(rotate(norm(q))ᵀ · rotate(norm(k)) / √head_width) · v of every head.

    Args:
        q: [batch, heads, head_width, tokens]; k, v: [batch, heads, head_width, keys], tokens first.
        scales: of the RMS norms of queries and keys, float32 [head_width] each.
        rotation: `tables` of the keys.

    Returns:
        [batch, heads, head_width, tokens], q's dtype.
    """
    block = query_block(q.shape[-1], k.shape[-1])
    # Several of few tokens, so that one's products hide behind another's softmax.
    most = max(1, HEADS * BLOCK // max(block, q.shape[-1], k.shape[-1]))
    together = next(n for n in range(min(most, q.shape[1]), 0, -1) if q.shape[1] % n == 0)
    columns = tuple(scale.astype(jnp.float32)[:, None] for scale in scales)
    return _attention(Options(epsilon, together, block), q, k, v, columns, rotation)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(options: Options, q: Any, k: Any, v: Any, scales: Any, rotation: Any) -> jax.Array:
    return _call_forward(options, q, k, v, scales, rotation)[0]


def _attention_forward(options: Options, q: Any, k: Any, v: Any, scales: Any, rotation: Any) -> tuple[jax.Array, Any]:
    out, sums = _call_forward(options, q, k, v, scales, rotation)
    return out, (q, k, v, scales, rotation, out, sums)


def _attention_backward(options: Options, saved: Any, by_out: jax.Array) -> Any:
    cos, sin = saved[4]
    *found, by_q_scale, by_k_scale = _call_backward(options, saved, by_out)
    by_scales = tuple(jnp.sum(part, axis=(0, 1)) for part in (by_q_scale, by_k_scale))
    return (*found, by_scales, (jnp.zeros_like(cos), jnp.zeros_like(sin)))


_attention.defvjp(_attention_forward, _attention_backward)


# ------------------------------------------------------------------------------------------------ inside a kernel


def product(a: jax.Array, b: jax.Array, axes: tuple[int, int]) -> jax.Array:
    """Return the product of two matrices over an axis of each, float32."""
    exact = a.dtype == jnp.float32
    return jax.lax.dot_general(
        a,
        b,
        (((axes[0],), (axes[1],)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
    )


def swap(x: jax.Array) -> jax.Array:
    """Exchange the two channels of each pair; x [channels, tokens], float32."""
    rows = x.reshape(-1, SUBLANES, x.shape[-1])
    even = jax.lax.broadcasted_iota(jnp.int32, rows.shape, 1) % 2 == 0
    return jnp.where(even, pltpu.roll(rows, SUBLANES - 1, 1), pltpu.roll(rows, 1, 1)).reshape(x.shape)


def turned(x: jax.Array, scale: jax.Array, cos: jax.Array, sin: jax.Array, epsilon: float) -> jax.Array:
    """Apply RMS norm over the channels, scale and rotation of x [channels, tokens], float32."""
    x = x.astype(jnp.float32)
    y = x * jax.lax.rsqrt(jnp.mean(x * x, axis=0, keepdims=True) + epsilon) * scale
    return y * cos + swap(y) * sin


def turned_gradient(
    x: jax.Array, scale: jax.Array, cos: jax.Array, sin: jax.Array, epsilon: float, gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return the gradients of `turned` by x, float32, and by scale [channels, 1]."""
    x = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(x * x, axis=0, keepdims=True) + epsilon)
    y = x * inverse
    by_scaled = gradient * cos + swap(gradient * sin)
    by_y = by_scaled * scale
    by_x = inverse * (by_y - y * jnp.mean(by_y * y, axis=0, keepdims=True))
    return by_x, jnp.sum(by_scaled * y, axis=1, keepdims=True)


def factor(head_width: int) -> float:
    """Return what queries are multiplied by, so that the scores are exponents of two."""
    return math.log2(math.e) / math.sqrt(head_width)


def _forward_kernel(q, k, v, q_scale, k_scale, cos, sin, out, sums, *, options: Options) -> None:
    tokens, block = q.shape[-1], options.block
    q_factor = q_scale[...] * factor(q.shape[-2])
    for head in range(options.heads):
        keys = turned(k[0, head], k_scale[...], cos[...], sin[...], options.epsilon).astype(q.dtype).T
        values = v[0, head]
        for start in range(0, tokens, block):
            part = slice(start, start + block)
            queries = turned(q[0, head, :, part], q_factor, cos[:, part], sin[:, part], options.epsilon)
            scores = product(keys, queries.astype(q.dtype), (1, 0))  # [keys, block]
            top = jnp.max(scores, axis=0, keepdims=True)
            weights = jnp.exp2(scores - top)
            total = jnp.sum(weights, axis=0, keepdims=True)
            mixed = product(values, weights.astype(q.dtype), (1, 0))  # [channels, block]
            out[0, head, :, part] = (mixed / total).astype(out.dtype)
            sums[0, head, :, part] = top + jnp.log2(total)


def _backward_kernel(
    q,
    k,
    v,
    q_scale,
    k_scale,
    cos,
    sin,
    out,
    sums,
    by_out,
    by_q,
    by_k,
    by_v,
    by_q_scale,
    by_k_scale,
    key_sum,
    value_sum,
    *,
    options: Options,
) -> None:
    tokens, block, dtype = q.shape[-1], options.block, q.dtype

    def add(total: Any, part: jax.Array, first: bool) -> None:
        """Add to a sum over all heads of an example, whose groups follow one another."""
        before = jnp.where(pl.program_id(1) == 0, 0.0, total[0, 0]) if first else total[0, 0]
        total[0, 0] = before + part

    q_factor = q_scale[...] * factor(q.shape[-2])
    for head in range(options.heads):
        keys = turned(k[0, head], k_scale[...], cos[...], sin[...], options.epsilon).astype(dtype)
        keys_down, values_down = keys.T, v[0, head].T
        for start in range(0, tokens, block):
            part = slice(start, start + block)
            turn = (q_factor, cos[:, part], sin[:, part], options.epsilon)
            queries = turned(q[0, head, :, part], *turn).astype(dtype)
            gradient = by_out[0, head, :, part]
            weights = jnp.exp2(product(keys_down, queries, (1, 0)) - sums[0, head, :, part])  # [keys, block]
            by_weights = product(values_down, gradient, (1, 0))
            along = jnp.sum(
                out[0, head, :, part].astype(jnp.float32) * gradient.astype(jnp.float32), axis=0, keepdims=True
            )
            by_scores = (weights * (by_weights - along)).astype(dtype)
            by_values = product(gradient, weights.astype(dtype), (1, 1))  # [channels, keys]
            by_keys = product(queries, by_scores, (1, 1))
            value_sum[...] = by_values if start == 0 else value_sum[...] + by_values
            key_sum[...] = by_keys if start == 0 else key_sum[...] + by_keys
            # Scores count in powers of two.
            by_queries = product(keys, by_scores, (1, 0)) * math.log(2)
            found, scale = turned_gradient(q[0, head, :, part], *turn, by_queries)
            by_q[0, head, :, part] = found.astype(by_q.dtype)
            add(by_q_scale, scale * factor(q.shape[-2]), first=head == start == 0)
        by_v[0, head] = value_sum[...].astype(by_v.dtype)
        found, scale = turned_gradient(
            k[0, head], k_scale[...], cos[...], sin[...], options.epsilon, key_sum[...] * math.log(2)
        )
        by_k[0, head] = found.astype(by_k.dtype)
        add(by_k_scale, scale, first=head == 0)


# ------------------------------------------------------------------------------------------------ their calls


def _specs(options: Options, *arrays: jax.Array) -> list[pl.BlockSpec]:
    """Pass arrays with batch and heads in by groups of heads, the others whole."""

    def spec(array: jax.Array) -> pl.BlockSpec:
        if array.ndim == 2:
            return pl.BlockSpec(array.shape, lambda i, j: (0, 0))
        if array.shape[1] == 1:  # a sum over the heads
            return pl.BlockSpec((1, *array.shape[1:]), lambda i, j: (i, 0, 0, 0))
        return pl.BlockSpec((1, options.heads, *array.shape[2:]), lambda i, j: (i, j, 0, 0))

    return [spec(array) for array in arrays]


def _call(
    kernel: Any,
    options: Options,
    arguments: tuple[Any, ...],
    results: Any,
    products: int,
    cycles: Any,
    scratch: Any = (),
):
    """Run a kernel for all examples and groups of heads.

    Args:
        products: over all pairs of queries and keys.
        cycles: for a pair, and for a token.
    """
    batch, heads, width, tokens = arguments[0].shape
    keys = arguments[1].shape[-1]
    pairs = batch * heads * tokens * keys
    cost = pl.CostEstimate(
        flops=2 * products * pairs * width,
        transcendentals=pairs,
        bytes_accessed=sum(math.prod(a.shape) * a.dtype.itemsize for a in (*arguments, *results)),
    )
    # Read by `run.program.costs`: XLA's model of the chip doesn't look into kernels.
    expected = round(cycles[0] * pairs + cycles[1] * batch * heads * keys)

    def run(*arguments: jax.Array, interpret: bool) -> Any:
        return pl.pallas_call(
            functools.partial(kernel, options=options),
            grid=(batch, heads // options.heads),
            in_specs=_specs(options, *arguments),
            out_specs=_specs(options, *results),
            out_shape=results,
            scratch_shapes=scratch,
            compiler_params=pltpu.CompilerParams(dimension_semantics=ORDER, vmem_limit_bytes=MEMORY),
            cost_estimate=cost,
            interpret=interpret,
            metadata={"estimated_cycles": str(expected)},
        )(*arguments)

    # Where there is no TPU, tests run the same kernel step by step.
    return jax.lax.platform_dependent(
        *arguments, tpu=functools.partial(run, interpret=False), default=functools.partial(run, interpret=True)
    )


def _call_forward(options: Options, q: Any, k: Any, v: Any, scales: Any, rotation: Any) -> Any:
    batch, heads, _, tokens = q.shape
    arguments = (q, k, v, *scales, *rotation)
    results = (jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((batch, heads, 1, tokens), jnp.float32))
    return _call(_forward_kernel, options, arguments, results, 2, FORWARD_CYCLES)


def _call_backward(options: Options, saved: Any, by_out: jax.Array) -> Any:
    q, k, v, scales, rotation, out, sums = saved
    batch, _, width, _ = q.shape
    arguments = (q, k, v, *scales, *rotation, out, sums, by_out.astype(q.dtype))
    by_scale = jax.ShapeDtypeStruct((batch, 1, width, 1), jnp.float32)
    results = (*(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (q, k, v)), by_scale, by_scale)
    wide = pltpu.VMEM((width, k.shape[-1]), jnp.float32)
    return _call(_backward_kernel, options, arguments, results, 5, BACKWARD_CYCLES, (wide, wide))
