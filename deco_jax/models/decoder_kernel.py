"""DeCo's pixel decoder for TPUs as one pass over its pixels, written by hand in Pallas.

XLA writes an array of the decoder to memory between any two products, and the decoder's products are so small that
this takes most of its time. Here a program of the grid takes the pixels of some patches at one place in the patch,
through all blocks, and only reads the noised pixels and their conditions and writes the prediction. The backward pass
computes the blocks again.

Channels lie along the sublanes and patches along the lanes. A column holds as many pixels of a patch, below one
another, as give it 128 channels; a product with a small matrix is one with that matrix several times along a diagonal
(`side_by_side.along_diagonal`). What isn't a product is float32. A vector comes as a matrix of 128 equal columns, so
that its gradient is a sum of registers; only outside the kernel its columns are added up.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
COLUMNS = 512  # in a program of the grid, at most
MEMORY = 64 * 2**20  # bytes of the fast memory that a kernel may take

# Cycles of a TPU for a column and block, and for a column besides, forwards and backwards. Not measured: the bundles
# that the compiler schedules for v5e with one block and with three, two points for two numbers.
FORWARD_CYCLES = (1.88, 1.38)
BACKWARD_CYCLES = (5.36, 2.54)

# The products and vectors of a block, in the order in which they are stacked.
SHIFT, SCALE, GATE, INTO, OUT, NORM_SCALE, NORM_SHIFT = range(7)
PRODUCTS = 5


class Options(NamedTuple):
    """What is fixed when a kernel is compiled."""

    epsilon: float
    width: int  # channels of a pixel
    columns: int  # in a program of the grid


class Weights(NamedTuple):
    """The decoder's weights, float32; LANES is the number of channels of a column.

    embed: [LANES, inputs]; products: [depth, PRODUCTS, LANES, LANES]; output: [outputs, LANES].
    vectors: [depth, PRODUCTS + 2, LANES, LANES]; output_bias: [outputs, LANES].
    """

    embed: Any
    products: Any
    vectors: Any
    output: Any
    output_bias: Any


def columns_at_a_time(rows: int) -> int:
    """Return how many columns a program of the grid takes; 0 if this number of patches doesn't fit."""
    return next((n for n in range(COLUMNS, 0, -LANES) if rows % n == 0), 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def decode(options: Options, values: Any, condition: Any, offset: Any, bias: Any, weights: Weights) -> jax.Array:
    """Return the decoder's output float32 [groups, outputs, rows].

    Args:
        values: the pixels [groups, inputs, rows], in the dtype of the products' factors.
        condition: [groups, LANES, rows], not activated.
        offset, bias: of the embedded pixels and of the condition, float32 [groups, LANES, LANES].
    """
    return _call_forward(options, values, condition, offset, bias, weights)


def _decode(options: Options, *arguments: Any) -> tuple[jax.Array, Any]:
    return decode(options, *arguments), arguments


def _decode_gradient(options: Options, saved: Any, gradient: jax.Array) -> Any:
    return _call_backward(options, saved, gradient)


decode.defvjp(_decode, _decode_gradient)


# ------------------------------------------------------------------------------------------------ inside a kernel


def product(a: jax.Array, b: jax.Array, axes: tuple[int, int] = (1, 0)) -> jax.Array:
    """Return the product of two matrices over an axis of each, in a's dtype and added up in float32."""
    exact = a.dtype == jnp.float32
    return jax.lax.dot_general(
        a,
        b.astype(a.dtype),
        (((axes[0],), (axes[1],)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
    )


def wide(vector: jax.Array, columns: int) -> jax.Array:
    """[channels, LANES] of equal columns → [channels, columns]."""
    return jnp.concatenate([vector] * (columns // LANES), axis=1)


def narrow(x: jax.Array) -> jax.Array:
    """Undo `wide` for a gradient: add up the registers of each channel."""
    return functools.reduce(jnp.add, [x[:, i : i + LANES] for i in range(0, x.shape[1], LANES)])


def mean(x: jax.Array, width: int) -> jax.Array:
    """Put the mean of each pixel's channels in place of them; x [channels, columns]."""
    pixels = x.reshape(-1, width, x.shape[-1])
    return jnp.broadcast_to(jnp.mean(pixels, axis=1, keepdims=True), pixels.shape).reshape(x.shape)


def normalized(x: jax.Array, options: Options) -> tuple[jax.Array, jax.Array]:
    """Return each pixel's channels at mean 0 and variance 1, and the inverse of its deviation."""
    x = x - mean(x, options.width)
    inverse = jax.lax.rsqrt(mean(x * x, options.width) + options.epsilon)
    return x * inverse, inverse


def normalized_gradient(y: jax.Array, inverse: jax.Array, gradient: jax.Array, width: int) -> jax.Array:
    return inverse * (gradient - mean(gradient, width) - y * mean(gradient * y, width))


class Block(NamedTuple):
    """What the backward pass needs of a block."""

    y: jax.Array  # normalised
    inverse: jax.Array
    scale: jax.Array  # of the modulation, with its 1
    gate: jax.Array
    modulated: jax.Array
    hidden: jax.Array  # before the activation
    out: jax.Array


def forward_block(h: jax.Array, c: jax.Array, products: Any, vectors: Any, options: Options) -> tuple[Any, Block]:
    """Apply one block to h [LANES, columns] with the activated condition c; products and vectors by their number."""
    columns = h.shape[1]

    def vector(number: int) -> jax.Array:
        return wide(vectors(number), columns)

    shift, scale, gate = (product(products(n), c) + vector(n) for n in (SHIFT, SCALE, GATE))
    scale = scale + 1
    y, inverse = normalized(h, options)
    modulated = (y * vector(NORM_SCALE) + vector(NORM_SHIFT)) * scale + shift
    hidden = product(products(INTO), modulated) + vector(INTO)
    out = product(products(OUT), jax.nn.silu(hidden)) + vector(OUT)
    return h + gate * out, Block(y, inverse, scale, gate, modulated, hidden, out)


def start(values: Any, condition: Any, offset: Any, bias: Any, embed: Any) -> tuple[jax.Array, jax.Array]:
    """Return the embedded pixels and the condition before its activation, float32 [LANES, columns]."""
    columns = condition.shape[1]
    h = product(embed, values) + wide(offset, columns)
    return h, condition.astype(jnp.float32) + wide(bias, columns)


def _forward_kernel(
    values, condition, offset, bias, embed, products, vectors, output, output_bias, out, *, options: Options
) -> None:
    h, c = start(values[0], condition[0], offset[0], bias[0], embed[...])
    c = jax.nn.silu(c).astype(embed.dtype)
    for i in range(products.shape[0]):
        h, _ = forward_block(h, c, lambda n, i=i: products[i, n], lambda n, i=i: vectors[i, n], options)
    y, _ = normalized(h, options)
    out[0] = product(output[...], y) + wide(output_bias[...], options.columns)


def _backward_kernel(
    values,
    condition,
    offset,
    bias,
    embed,
    products,
    vectors,
    output,
    output_bias,
    gradient,
    by_values,
    by_condition,
    by_offset,
    by_bias,
    by_embed,
    by_products,
    by_vectors,
    by_output,
    by_output_bias,
    *,
    options: Options,
) -> None:
    dtype, width = embed.dtype, options.width

    @pl.when(pl.program_id(1) == 0)
    def _() -> None:
        by_offset[...] = jnp.zeros_like(by_offset)
        by_bias[...] = jnp.zeros_like(by_bias)

    @pl.when((pl.program_id(0) == 0) & (pl.program_id(1) == 0))
    def _() -> None:
        for total in (by_embed, by_products, by_vectors, by_output, by_output_bias):
            total[...] = jnp.zeros_like(total)

    h, before = start(values[0], condition[0], offset[0], bias[0], embed[...])
    gate = jax.nn.sigmoid(before)
    c, c_slope = (before * gate).astype(dtype), gate * (1 + before * (1 - gate))
    blocks = []
    for i in range(products.shape[0]):
        h, block = forward_block(h, c, lambda n, i=i: products[i, n], lambda n, i=i: vectors[i, n], options)
        blocks.append(block)
    y, inverse = normalized(h, options)

    g = gradient[0]
    by_output_bias[...] += narrow(g)
    by_output[...] += product(g.astype(dtype), y, (1, 1))
    by_h = normalized_gradient(y, inverse, product(output[...].T, g), width)
    by_c = jnp.zeros_like(before)
    for i, block in reversed(list(enumerate(blocks))):

        def through(number: int, by_result: jax.Array, factor: jax.Array, i: int = i) -> jax.Array:
            """Add the gradients of a product's matrix and bias; return that of its other factor."""
            rounded = by_result.astype(dtype)
            by_products[i, number] += product(rounded, factor, (1, 1))
            by_vectors[i, number] += narrow(by_result)
            return product(products[i, number].T, rounded)

        slope = jax.nn.sigmoid(block.hidden)
        active = block.hidden * slope
        by_active = through(OUT, by_h * block.gate, active)
        by_modulated = through(INTO, by_active * (slope + active * (1 - slope)), block.modulated)
        by_c += through(GATE, by_h * block.out, c)
        by_c += through(SHIFT, by_modulated, c)
        norm_scale, norm_shift = (wide(vectors[i, n], options.columns) for n in (NORM_SCALE, NORM_SHIFT))
        by_c += through(SCALE, by_modulated * (block.y * norm_scale + norm_shift), c)
        by_scaled = by_modulated * block.scale
        by_vectors[i, NORM_SHIFT] += narrow(by_scaled)
        by_vectors[i, NORM_SCALE] += narrow(by_scaled * block.y)
        by_h += normalized_gradient(block.y, block.inverse, by_scaled * norm_scale, width)

    by_before = by_c * c_slope
    by_condition[0] = by_before.astype(by_condition.dtype)
    by_bias[0] += narrow(by_before)
    by_offset[0] += narrow(by_h)
    rounded = by_h.astype(dtype)
    by_embed[...] += product(rounded, values[0], (1, 1))
    by_values[0] = product(embed[...].T, rounded).astype(by_values.dtype)


# ------------------------------------------------------------------------------------------------ their calls


# How an array is passed to a program of the grid: its columns, its group's vectors, or all of it.
COLUMN, GROUP, WHOLE = "columns", "group", "whole"
ARGUMENTS = (COLUMN, COLUMN, GROUP, GROUP, *[WHOLE] * len(Weights._fields))


def _spec(options: Options, kind: str, array: Any) -> pl.BlockSpec:
    if kind == COLUMN:
        return pl.BlockSpec((1, array.shape[1], options.columns), lambda i, j: (i, 0, j))
    if kind == GROUP:
        return pl.BlockSpec((1, *array.shape[1:]), lambda i, j: (i, 0, 0))
    return pl.BlockSpec(array.shape, lambda i, j: (0,) * array.ndim)


def _call(
    kernel: Any,
    options: Options,
    arguments: tuple[Any, ...],
    results: dict[str, tuple[Any, ...]],
    passes: int,
    cycles: tuple[float, float],
) -> Any:
    """Run a kernel for all groups and columns.

    Args:
        arguments: as ARGUMENTS says; more are columns.
        results: by kind.
        passes: how often it multiplies with each matrix.
        cycles: for a column and block, and for a column.
    """
    groups, inputs, rows = arguments[0].shape
    depth, columns = arguments[5].shape[0], groups * rows
    kinds = (*ARGUMENTS, *[COLUMN] * (len(arguments) - len(ARGUMENTS)))
    made = [(kind, array) for kind, arrays in results.items() for array in arrays]
    moved = (*arguments, *(array for _, array in made))
    cost = pl.CostEstimate(
        flops=2 * passes * columns * LANES * (depth * PRODUCTS * LANES + 2 * inputs),
        transcendentals=columns * LANES * (depth + 1),
        bytes_accessed=sum(math.prod(array.shape) * array.dtype.itemsize for array in moved),
    )
    # Read by `run.program.costs`: XLA's model of the chip doesn't look into kernels.
    expected = round((cycles[0] * depth + cycles[1]) * columns)

    def run(*arguments: jax.Array, interpret: bool) -> Any:
        return pl.pallas_call(
            functools.partial(kernel, options=options),
            grid=(groups, rows // options.columns),
            in_specs=[_spec(options, kind, array) for kind, array in zip(kinds, arguments, strict=True)],
            out_specs=[_spec(options, kind, array) for kind, array in made],
            out_shape=[array for _, array in made],
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("arbitrary", "arbitrary"), vmem_limit_bytes=MEMORY
            ),
            cost_estimate=cost,
            interpret=interpret,
            metadata={"estimated_cycles": str(expected)},
        )(*arguments)

    # Where there is no TPU, tests run the same kernel step by step.
    return jax.lax.platform_dependent(
        *arguments, tpu=functools.partial(run, interpret=False), default=functools.partial(run, interpret=True)
    )


def _arguments(values: Any, condition: Any, offset: Any, bias: Any, weights: Weights) -> tuple[Any, ...]:
    """Return a kernel's arguments, the factors of products in the compute dtype."""
    factors = {name: getattr(weights, name).astype(values.dtype) for name in ("embed", "products", "output")}
    return (values, condition, offset, bias, *weights._replace(**factors))


def _call_forward(options: Options, *arguments: Any) -> jax.Array:
    values, weights = arguments[0], arguments[4]
    result = jax.ShapeDtypeStruct((len(values), len(weights.output), values.shape[2]), jnp.float32)
    (out,) = _call(_forward_kernel, options, _arguments(*arguments), {COLUMN: (result,)}, 1, FORWARD_CYCLES)
    return out


def _call_backward(options: Options, saved: Any, gradient: jax.Array) -> Any:
    values, condition, offset, bias, weights = saved
    results = {COLUMN: (values, condition), GROUP: (offset, bias), WHOLE: tuple(weights)}
    shapes = {
        kind: tuple(jax.ShapeDtypeStruct(array.shape, array.dtype) for array in arrays)
        for kind, arrays in results.items()
    }
    found = _call(_backward_kernel, options, (*_arguments(*saved), gradient), shapes, 3, BACKWARD_CYCLES)
    return (*found[:4], Weights(*found[4:]))
