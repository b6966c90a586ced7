"""DeCo's pixel decoder: high frequencies by a tiny network without attention at every pixel.

Source: DeCo (arXiv 2511.19365), its pixel decoder. Everything is per pixel; what ties pixels together is
the condition, a vector for each pixel that one Linear draws from its patch's low-frequency features (the
paper's linear upsampling).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from deco_jax.models.layers import (
    Dtype,
    LayerNorm,
    Linear,
    modulate,
    normalize,
    patchify,
    rotary_angles,
    run_stack,
    stack,
    unpatchify,
    xavier,
    zeros,
)
from deco_jax.run.sharding import on_tpu

POSITION_FEATURES = 64
LANES = 128  # of a TPU's registers
ROWS_AT_A_TIME = 8192  # of the decoder on a TPU: 2 MB an array in bfloat16


def cosine_basis(side: int) -> np.ndarray:
    """Position features of a class-to-image patch: cos(π·x·fx)·cos(π·y·fy) / (1 + fx·fy).

    Returns:
        float32 [side², 64], pixels row by row; x, y = linspace(0, 1, side) along columns and rows,
        fx, fy = linspace(0, 8, 8); feature 8·i + j has the horizontal frequency fx_i and the vertical fy_j.
    """
    frequencies = np.linspace(0, 8, 8)
    waves = np.cos(np.pi * np.outer(np.linspace(0, 1, side), frequencies))  # [side, 8]
    damping = 1 / (1 + np.outer(frequencies, frequencies))
    features = np.einsum("xi,yj,ij->yxij", waves, waves, damping)
    return features.reshape(side * side, POSITION_FEATURES).astype(np.float32)


def rotary_basis(side: int) -> np.ndarray:
    """Position features of a text-to-image patch: the cosines of a width-128 RoPE table.

    Returns:
        float32 [side², 64], pixels row by row, both axes linspace(0, side, side).
    """
    positions = np.linspace(0, side, side)
    return np.cos(rotary_angles(positions, positions, 2 * POSITION_FEATURES))


def weights(linear: nnx.Linear) -> tuple[jax.Array, jax.Array]:
    """A Linear's kernel [inputs, outputs] and bias [outputs]."""
    if linear.bias is None:
        raise ValueError("this Linear has no bias")
    return linear.kernel[...], linear.bias[...]


def embed_pixels(
    values: jax.Array, basis: np.ndarray, embed: nnx.Linear, following: nnx.Linear | None = None
) -> jax.Array:
    """following(embed(values ++ basis)), without ever building the wide per-pixel vectors.

    The position features are the same in every patch and nothing nonlinear stands between the two layers,
    so both fold into one small matrix for the values and one bias a query: at width 32 that is 96
    multiply-adds a pixel instead of 3,168.

    Args:
        values: [batch, tokens, queries, channels]; basis: [queries, 64].

    Returns:
        [batch, tokens, queries, width] in the layer's compute dtype.
    """
    channels = values.shape[-1]
    weight, offset = embedding_weights(channels, basis, embed, following)
    rows = values.astype(embed.dtype).reshape(-1, channels) @ weight.astype(embed.dtype)
    return rows.reshape(*values.shape[:-1], -1) + offset.astype(embed.dtype)


def embedding_weights(
    channels: int, basis: np.ndarray, embed: nnx.Linear, following: nnx.Linear | None = None
) -> tuple[jax.Array, jax.Array]:
    """`embed_pixels` as one matrix [channels, width] and a bias a query [queries, width], both float32."""
    with jax.default_matmul_precision("highest"):  # tiny, so exactness is free
        kernel, bias = weights(embed)
        weight, offset = kernel[:channels], jnp.asarray(basis) @ kernel[channels:] + bias
        if following is not None:
            kernel, bias = weights(following)
            weight, offset = weight @ kernel, offset @ kernel + bias
    return weight, offset


def to_queries(images: jax.Array, patch_size: int, query_size: int) -> jax.Array:
    """[batch, height, width, 3] → [batch, tokens, queries a token, 3 · query_size²], all row by row."""
    patches = patchify(images, patch_size)
    batch, tokens = patches.shape[:2]
    queries = patchify(patches.reshape(batch * tokens, patch_size, patch_size, 3), query_size)
    return queries.reshape(batch, tokens, (patch_size // query_size) ** 2, 3 * query_size**2)


def from_queries(queries: jax.Array, patch_size: int, query_size: int, height: int, width: int) -> jax.Array:
    """Undoes `to_queries`."""
    batch, tokens = queries.shape[:2]
    patches = queries.reshape(batch * tokens, -1, query_size**2, 3)
    patches = unpatchify(patches, query_size, patch_size, patch_size).reshape(batch, tokens, patch_size**2, 3)
    return unpatchify(patches, patch_size, height, width)


def along_diagonal(kernel: jax.Array, count: int) -> jax.Array:
    """[inputs, outputs] → [count · inputs, count · outputs], zero outside the diagonal's `count` copies."""
    inputs, outputs = kernel.shape
    copies = jnp.eye(count, dtype=kernel.dtype)[:, None, :, None] * kernel[None, :, None, :]
    return copies.reshape(count * inputs, count * outputs)


def side_by_side_weights(linear: nnx.Linear, count: int, dtype: Dtype, parts: int = 1) -> tuple[jax.Array, jax.Array]:
    """Kernel and bias of a Linear for rows that hold `count` inputs: [count · inputs, count · outputs] and
    [count · outputs].

    Args:
        parts: that the outputs are split into afterwards; each comes out for all inputs of a row.
    """
    kernel, bias = (w.astype(dtype) for w in weights(linear))
    kernels = [along_diagonal(part, count) for part in jnp.split(kernel, parts, axis=-1)]
    return jnp.concatenate(kernels, axis=-1), jnp.concatenate([jnp.tile(b, count) for b in jnp.split(bias, parts)])


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def normalize_side_by_side(x: jax.Array, count: int, epsilon: float = 1e-6) -> jax.Array:
    """`layers.normalize` of each of the `count` vectors that a row holds, in float32."""
    return _normalize(x, count, epsilon)[0]


def _normalize(x: jax.Array, count: int, epsilon: float) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    exact = x.dtype == jnp.float32
    y = x.astype(jnp.float32) - _mean_side_by_side(x, count, exact)
    scale = jax.lax.rsqrt(_mean_side_by_side(y * y, count, exact) + epsilon)
    return y * scale, (y * scale, scale, x)


def _normalize_gradient(
    count: int, epsilon: float, saved: tuple[jax.Array, ...], gradient: jax.Array
) -> tuple[jax.Array]:
    normalized, scale, x = saved
    exact = x.dtype == jnp.float32
    along = _mean_side_by_side(gradient * normalized, count, exact)
    result = scale * (gradient - _mean_side_by_side(gradient, count, exact) - normalized * along)
    return (result.astype(x.dtype),)


normalize_side_by_side.defvjp(_normalize, _normalize_gradient)


def _mean_side_by_side(x: jax.Array, count: int, exact: bool) -> jax.Array:
    """The mean of each vector in place of its channels, float32: a product with a matrix, which moves no lanes."""
    width = x.shape[-1] // count
    average = np.kron(np.eye(count), np.full((width, width), 1 / width))
    if exact:
        return jnp.matmul(x, jnp.asarray(average, jnp.float32), precision="highest")

    def product(part: jax.Array) -> jax.Array:
        return jnp.matmul(part, jnp.asarray(average, part.dtype), preferred_element_type=jnp.float32)

    if x.dtype == jnp.bfloat16:
        return product(x)
    # Two bfloat16 hold 16 of a float32's 24 bits, at a third of the cost of an exact product.
    high = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    return product(high.astype(jnp.bfloat16)) + product((x - high).astype(jnp.bfloat16))


class DecoderBlock(nnx.Module):
    """One residual MLP a pixel, with the condition by adaptive layer norm or by addition.

    adaln: shift, scale, gate = Linear(silu(y)); h += gate · MLP(mod(LayerNorm(h), shift, scale)).
    add: h += y; h += MLP(LayerNorm(h)).
    """

    def __init__(self, width: int, interaction: str, *, dtype: Dtype, rngs: nnx.Rngs) -> None:
        self.interaction = interaction
        self.norm = LayerNorm(width)
        self.mlp_in = Linear(width, width, kernel_init=xavier, bias_init=zeros, dtype=dtype, rngs=rngs)
        self.mlp_out = Linear(width, width, kernel_init=xavier, bias_init=zeros, dtype=dtype, rngs=rngs)
        if interaction == "adaln":
            self.modulation = Linear(width, 3 * width, kernel_init=zeros, bias_init=zeros, dtype=dtype, rngs=rngs)

    def __call__(self, h: jax.Array, condition: jax.Array) -> jax.Array:
        """h, condition (already activated for adaln): [..., width] → h's shape."""
        if self.interaction == "add":
            h = h + condition
            return h + self.mlp_out(jax.nn.silu(self.mlp_in(self.norm(h))))
        shift, scale, gate = jnp.split(self.modulation(condition), 3, axis=-1)
        return h + gate * self.mlp_out(jax.nn.silu(self.mlp_in(modulate(self.norm(h), shift, scale))))

    def side_by_side(self, h: jax.Array, condition: jax.Array, count: int) -> jax.Array:
        """The same for rows that hold `count` queries: [..., count · width]."""

        def linear(layer: nnx.Linear, x: jax.Array, parts: int = 1) -> jax.Array:
            kernel, bias = side_by_side_weights(layer, count, x.dtype, parts)
            return x @ kernel + bias

        def norm(h: jax.Array) -> jax.Array:
            y = normalize_side_by_side(h, count, self.norm.epsilon)
            scale, bias = (jnp.tile(vector[...], count) for vector in (self.norm.scale, self.norm.bias))
            return (y * scale + bias).astype(h.dtype)

        def mlp(h: jax.Array) -> jax.Array:
            return linear(self.mlp_out, jax.nn.silu(linear(self.mlp_in, h)))

        if self.interaction == "add":
            h = h + condition
            return h + mlp(norm(h))
        shift, scale, gate = jnp.split(linear(self.modulation, condition, parts=3), 3, axis=-1)
        return h + gate * mlp(modulate(norm(h), shift, scale))


class PixelDecoder(nnx.Module):
    """From the noised pixels and the low-frequency features to the prediction at every pixel.

    Args:
        model_width: channels of the low-frequency features; width, depth: of the decoder.
        patch_size: pixels a side that share a condition.
        query_size: pixels a side that the decoder treats as one token; 1 in the paper's model.
        interaction: "adaln" or "add".
        chunk: queries worked on at a time, 0 for all at once. On a CPU some thousands keep the working set in
            the cache, and the backward pass computes a chunk again instead of reading it from memory. It must
            divide the number of a device's queries to have an effect.
        rotary: text-to-image's position features instead of class-to-image's.
    """

    def __init__(
        self,
        model_width: int,
        *,
        width: int,
        depth: int,
        patch_size: int,
        query_size: int,
        interaction: str,
        chunk: int,
        rotary: bool,
        dtype: Dtype,
        remat: str,
        rngs: nnx.Rngs,
    ) -> None:
        self.depth, self.patch_size, self.query_size, self.interaction = depth, patch_size, query_size, interaction
        self.chunk, self.rotary, self.dtype, self.remat = chunk, rotary, dtype, remat
        values, queries = 3 * query_size**2, (patch_size // query_size) ** 2
        self.pixel_embed = Linear(values + POSITION_FEATURES, width, dtype=dtype, rngs=rngs)
        self.input = Linear(width, width, kernel_init=xavier, bias_init=zeros, dtype=dtype, rngs=rngs)
        self.condition = Linear(
            model_width, queries * width, kernel_init=xavier, bias_init=zeros, dtype=dtype, rngs=rngs
        )
        self.blocks = stack(lambda rngs: DecoderBlock(width, interaction, dtype=dtype, rngs=rngs), depth, rngs)
        self.output = Linear(width, values, kernel_init=zeros, bias_init=zeros, dtype=dtype, rngs=rngs)

    @jax.named_scope("decoder")
    def __call__(self, images: jax.Array, features: jax.Array) -> jax.Array:
        """images [batch, height, width, 3], features [batch, tokens, model_width] → float32, images' shape."""
        side = self.patch_size // self.query_size
        basis = rotary_basis(side) if self.rotary else cosine_basis(side)
        queries = to_queries(images, self.patch_size, self.query_size)
        width = self.input.out_features
        if on_tpu() and not self.chunk and LANES % width == 0 and queries.shape[2] % (LANES // width) == 0:
            values = self.side_by_side(queries, features, basis, LANES // width)
            return from_queries(values, self.patch_size, self.query_size, *images.shape[1:3])
        h = embed_pixels(queries, basis, self.pixel_embed, self.input)
        shape = h.shape
        # Plain matrices [queries, width] from here on: XLA multiplies those, and above all transposes them for the
        # gradients, two to three times faster on a CPU than the same with more axes.
        h = h.reshape(-1, shape[-1])
        condition = self.condition(features).reshape(h.shape)
        if self.chunk and len(h) % self.chunk == 0:
            chunks = [a.reshape(-1, self.chunk, a.shape[-1]) for a in (h, condition)]
            values = jax.lax.map(jax.checkpoint(lambda pair: self.decode(*pair)), chunks)
        else:
            values = self.decode(h, condition)
        values = values.astype(jnp.float32).reshape(*shape[:-1], -1)
        return from_queries(values, self.patch_size, self.query_size, *images.shape[1:3])

    def side_by_side(self, queries: jax.Array, features: jax.Array, basis: np.ndarray, count: int) -> jax.Array:
        """The same for TPUs: `count` queries of a token share a row, whose channels then fill the 128 lanes.

        A product with a small matrix becomes one with that matrix `count` times along a diagonal, and so does a mean
        over a query's channels. Some thousand rows at a time stay in the fast memory; the backward pass computes them
        again instead of reading them.

        Args:
            queries: [batch, tokens, queries, channels]; features: [batch, tokens, model_width].

        Returns:
            float32, queries' shape.
        """
        batch, tokens, number, channels = queries.shape
        rows, groups, dtype = batch * tokens, number // count, self.dtype
        together = next(n for n in range(groups, 0, -1) if groups % n == 0 and (n == 1 or n * rows <= ROWS_AT_A_TIME))

        def split(a: jax.Array) -> jax.Array:
            return a.reshape(groups // together, together, *a.shape[1:])

        # Groups of queries lead, [groups, ..., rows, ...]: so the condition comes out of its product.
        kernel, bias = (w.astype(dtype) for w in weights(self.condition))
        condition = jnp.einsum("rm,mgc->grc", features.reshape(rows, -1), kernel.reshape(len(kernel), groups, -1))
        condition = condition + bias.reshape(groups, 1, -1)
        values = jnp.transpose(queries.astype(dtype).reshape(rows, groups, count * channels), (1, 2, 0))
        weight, offset = embedding_weights(channels, basis, self.pixel_embed, self.input)
        offset = offset.reshape(groups, 1, -1)

        def decode(parts: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
            values, condition, offset = parts
            h = jnp.einsum("gvr,vc->grc", values, along_diagonal(weight, count).astype(dtype)) + offset.astype(dtype)
            if self.interaction == "adaln":
                condition = jax.nn.silu(condition)
            h = run_stack(
                self.blocks, h, lambda block, h: block.side_by_side(h, condition, count), dtype=dtype, unroll=self.depth
            )
            kernel, bias = side_by_side_weights(self.output, count, dtype)
            return jnp.einsum("grc,cv->gvr", normalize_side_by_side(h, count).astype(dtype), kernel) + bias[:, None]

        values = jax.lax.map(jax.checkpoint(decode), (split(values), split(condition), split(offset)))
        values = jnp.transpose(values.reshape(groups, count * channels, rows), (2, 0, 1))
        return values.astype(jnp.float32).reshape(queries.shape)

    def decode(self, h: jax.Array, condition: jax.Array) -> jax.Array:
        """Embedded queries and their conditions, both [queries, width] → values [queries, 3 · query_size²]."""
        if self.interaction == "adaln":
            condition = jax.nn.silu(condition)
        h = run_stack(
            self.blocks, h, lambda block, h: block(h, condition), dtype=self.dtype, remat=self.remat, unroll=self.depth
        )
        return self.output(normalize(h))
