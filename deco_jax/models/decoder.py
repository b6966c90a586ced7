"""DeCo's pixel decoder: high frequencies by a tiny network without attention at every pixel.

Source: DeCo (arXiv 2511.19365), its pixel decoder. Everything is per pixel; what ties pixels together is
the condition, a vector for each pixel that one Linear draws from its patch's low-frequency features (the
paper's linear upsampling).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from deco_jax.models import decoder_kernel, side_by_side
from deco_jax.models.layers import (
    Dtype,
    LayerNorm,
    Linear,
    gather_parameters,
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
from deco_jax.models.side_by_side import LANES, Rows, along_diagonal
from deco_jax.run.devices import on_tpu

POSITION_FEATURES = 64
# Of the decoder on a TPU: 2 MB an array in bfloat16. Many more lie in the slow memory between any two operations.
ROWS_AT_A_TIME, LEAST_ROWS = 8192, 1024


def cosine_basis(side: int) -> np.ndarray:
    """Return the position features of a class-to-image patch: cos(π·x·fx)·cos(π·y·fy) / (1 + fx·fy).

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
    """Return the position features of a text-to-image patch: the cosines of a width-128 RoPE table.

    Returns:
        float32 [side², 64], pixels row by row, both axes linspace(0, side, side).
    """
    positions = np.linspace(0, side, side)
    return np.cos(rotary_angles(positions, positions, 2 * POSITION_FEATURES))


def rows_at_a_time(rows: int) -> int:
    """How many of a group's rows the decoder takes at a time on a TPU; all of them where no such part divides them."""
    if rows <= 2 * ROWS_AT_A_TIME:  # by XLA's estimate for v6e, two halves of these cost more
        return rows
    return next((n for n in range(ROWS_AT_A_TIME, LEAST_ROWS - 1, -LANES) if rows % n == 0), rows)


def weights(linear: nnx.Linear) -> tuple[jax.Array, jax.Array]:
    """Return a Linear's kernel [inputs, outputs] and bias [outputs]."""
    if linear.bias is None:
        raise ValueError("this Linear has no bias")
    return linear.kernel[...], linear.bias[...]


def embed_pixels(
    values: jax.Array, basis: np.ndarray, embed: nnx.Linear, following: nnx.Linear | None = None
) -> jax.Array:
    """Return following(embed(values ++ basis)), without ever building the wide per-pixel vectors.

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
    """Return `embed_pixels` as one matrix [channels, width] and a bias a query [queries, width], both float32."""
    with jax.default_matmul_precision("highest"):  # tiny, so exactness is free
        kernel, bias = weights(embed)
        weight, offset = kernel[:channels], jnp.asarray(basis) @ kernel[channels:] + bias
        if following is not None:
            kernel, bias = weights(following)
            weight, offset = weight @ kernel, offset @ kernel + bias
    return weight, offset


def to_queries(images: jax.Array, patch_size: int, query_size: int) -> jax.Array:
    """Cut [batch, height, width, 3] into [batch, tokens, queries a token, 3 · query_size²], all row by row."""
    patches = patchify(images, patch_size)
    batch, tokens = patches.shape[:2]
    queries = patchify(patches.reshape(batch * tokens, patch_size, patch_size, 3), query_size)
    return queries.reshape(batch, tokens, (patch_size // query_size) ** 2, 3 * query_size**2)


def from_queries(queries: jax.Array, patch_size: int, query_size: int, height: int, width: int) -> jax.Array:
    """Undo `to_queries`."""
    batch, tokens = queries.shape[:2]
    patches = queries.reshape(batch * tokens, -1, query_size**2, 3)
    patches = unpatchify(patches, query_size, patch_size, patch_size).reshape(batch, tokens, patch_size**2, 3)
    return unpatchify(patches, patch_size, height, width)


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

    def side_by_side(self, rows: Rows, h: jax.Array, condition: jax.Array) -> jax.Array:
        """Do the same for rows that hold several queries, in float32."""

        def norm(h: jax.Array) -> jax.Array:
            y = side_by_side.normalize(rows, h, self.norm.epsilon)
            return side_by_side.scale_and_shift(rows, y, self.norm.scale[...], self.norm.bias[...])

        def mlp(h: jax.Array) -> jax.Array:
            (hidden,) = side_by_side.linear(rows, self.mlp_in, h)
            (out,) = side_by_side.linear(rows, self.mlp_out, jax.nn.silu(hidden))
            return out

        if self.interaction == "add":
            h = h + condition
            return h + mlp(norm(h))
        shift, scale, gate = side_by_side.linear(rows, self.modulation, condition, parts=3)
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
        forward_mode: whether forward-mode products are taken; the rows of a TPU's registers have none.
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
        forward_mode: bool = False,
        rngs: nnx.Rngs,
    ) -> None:
        self.forward_mode = forward_mode
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
        fits = LANES % width == 0 and queries.shape[2] % (LANES // width) == 0
        if on_tpu() and not self.chunk and not self.forward_mode and fits:
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
        """Do the same for TPUs: `count` queries of a token share a row, whose channels then fill the 128 lanes.

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
        if self.interaction == "adaln" and decoder_kernel.columns_at_a_time(rows):
            return self.by_kernel(queries, features, basis, count)
        layout = Rows(count, dtype)
        piece = rows_at_a_time(rows)
        pieces = rows // piece
        together = 1
        if pieces == 1:
            together = next(n for n in range(max(1, min(groups, ROWS_AT_A_TIME // rows)), 0, -1) if groups % n == 0)

        def split(a: jax.Array) -> jax.Array:
            return a.reshape(groups * pieces // together, together, *a.shape[2:])

        # Groups of queries lead, [groups, pieces, ..., rows, ...]: so the condition comes out of its product.
        kernel, bias = weights(self.condition)
        kernel = kernel.astype(dtype).reshape(len(kernel), groups, -1)
        condition = jnp.einsum("rm,mgc->grc", features.reshape(rows, -1), kernel).reshape(groups, pieces, piece, -1)
        values = queries.astype(dtype).reshape(pieces, piece, groups, count * channels).transpose(2, 0, 3, 1)
        weight, offset = embedding_weights(channels, basis, self.pixel_embed, self.input)

        def decode(parts: tuple[jax.Array, ...]) -> jax.Array:
            values, condition, offset, bias = parts
            h = layout.product(values.swapaxes(1, 2), along_diagonal(weight, count))
            h, condition = side_by_side.shift(layout, h, offset), side_by_side.shift(layout, condition, bias)
            if self.interaction == "adaln":
                condition = jax.nn.silu(condition)
            h = run_stack(self.blocks, h, lambda block, h: block.side_by_side(layout, h, condition), unroll=self.depth)
            (pixels,) = side_by_side.linear(layout, self.output, side_by_side.normalize(layout, h))
            return pixels.swapaxes(1, 2)

        vectors = [jnp.repeat(vector.reshape(groups, 1, -1), pieces, axis=1) for vector in (offset, bias)]
        parts = tuple(split(part) for part in (values, condition, *vectors))
        values = jax.lax.map(jax.checkpoint(decode), parts).reshape(groups, pieces, count * channels, piece)
        return values.transpose(1, 3, 0, 2).astype(jnp.float32).reshape(queries.shape)

    def by_kernel(self, queries: jax.Array, features: jax.Array, basis: np.ndarray, count: int) -> jax.Array:
        """Do the same in one pass over the pixels; see `decoder_kernel`."""
        batch, tokens, number, channels = queries.shape
        rows, groups, dtype, width = batch * tokens, number // count, self.dtype, self.input.out_features
        kernel, bias = weights(self.condition)
        kernel = kernel.astype(dtype).reshape(len(kernel), groups, -1)
        condition = jnp.einsum("rm,mgc->gcr", features.reshape(rows, -1), kernel)
        values = queries.astype(dtype).reshape(rows, groups, count * channels).transpose(1, 2, 0)
        weight, offset = embedding_weights(channels, basis, self.pixel_embed, self.input)

        def columns(vectors: jax.Array) -> jax.Array:
            return jnp.broadcast_to(vectors[..., None], (*vectors.shape, LANES))

        def repeated(vectors: jax.Array) -> jax.Array:
            return columns(jnp.tile(vectors, count))

        def factor(kernel: jax.Array) -> jax.Array:
            return along_diagonal(kernel, count).T

        blocks = gather_parameters(self.blocks, stacks=True)
        kernels, biases = zip(
            *(weights(each) for each in (blocks.modulation, blocks.mlp_in, blocks.mlp_out)), strict=True
        )
        kernels = (*jnp.split(kernels[0], 3, axis=-1), *kernels[1:])
        biases = (*jnp.split(biases[0], 3, axis=-1), *biases[1:], blocks.norm.scale[...], blocks.norm.bias[...])
        output, output_bias = weights(self.output)
        values = decoder_kernel.decode(
            decoder_kernel.Options(blocks.norm.epsilon, width, decoder_kernel.columns_at_a_time(rows)),
            values,
            condition,
            columns(offset.reshape(groups, -1)),
            columns(bias.reshape(groups, -1)),
            decoder_kernel.Weights(
                factor(weight),
                jnp.stack([jax.vmap(factor)(kernel) for kernel in kernels], axis=1),
                jnp.stack([jax.vmap(repeated)(vector) for vector in biases], axis=1),
                factor(output),
                repeated(output_bias),
            ),
        )
        return values.transpose(2, 0, 1).reshape(queries.shape)

    def decode(self, h: jax.Array, condition: jax.Array) -> jax.Array:
        """Decode embedded queries and their conditions, both [queries, width], to values [queries, 3 · query_size²]."""
        if self.interaction == "adaln":
            condition = jax.nn.silu(condition)
        h = run_stack(
            self.blocks, h, lambda block, h: block(h, condition), dtype=self.dtype, remat=self.remat, unroll=self.depth
        )
        return self.output(normalize(h))
