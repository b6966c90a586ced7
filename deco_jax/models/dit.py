"""The diffusion transformer: DeCo's low-frequency half, and by itself the baseline.

    images ─ patchify ─ Linear ─┐
    times ─ TimestepEmbedding ──┼─ blocks (scan) ─ hidden [batch, tokens, width] ─ a head: DeCo, DiT, PixNerd
    labels or text ─────────────┘

Source: DeCo (arXiv 2511.19365); blocks after DiT (Peebles & Xie 2023) with RMSNorm, SwiGLU and
two-dimensional RoPE.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.nn import initializers

from deco_jax.convert.mapping import Row
from deco_jax.models.layers import (
    REMAT_POLICIES,
    Dtype,
    Linear,
    RMSNorm,
    SwiGLU,
    TimestepEmbedding,
    modulate,
    normalize,
    patchify,
    rotary_angles,
    rotate,
    run_stack,
    stack,
    unpatchify,
    xavier,
    zeros,
)
from deco_jax.models.trunk import RULES, Architecture, linear_rows, patch_out, patch_out_bias, trunk_flops, trunk_rows
from deco_jax.schema import Rule, at_least, one_of, setting
from deco_jax.shapes import Images, Labels, PerExample, Text


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
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        with_text: bool,
        implementation: Literal["xla", "cudnn"],
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
        q, k, v = self.qkv.to_heads(x, self.num_heads, 3)
        q, k = self.q_norm(q), self.k_norm(k)
        if angles is not None:
            q, k = rotate(q, angles), rotate(k, angles)
        if text is not None:
            text_k, text_v = self.text_kv.to_heads(text, self.num_heads, 2)
            k = jnp.concatenate([k, self.k_norm(text_k)], axis=1)
            v = jnp.concatenate([v, text_v], axis=1)
        return self.out.from_heads(jax.nn.dot_product_attention(q, k, v, implementation=self.implementation))


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
        attention: Literal["xla", "cudnn"] = "xla",
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
        attended = self.attention(modulate(self.norm1(h), shift1, scale1), angles, text)
        drop_hidden = None
        if dropout is not None:
            attended, drop_hidden = dropout.drop(attended, 0), functools.partial(dropout.drop, place=1)
        h = h + gate1 * attended
        return h + gate2 * self.mlp(modulate(self.norm2(h), shift2, scale2), drop_hidden)


@dataclasses.dataclass(frozen=True)
class TrunkSettings:
    """The settings of the transformer, which every model here has; see `schema.setting`."""

    prediction: str = setting("v", "What the output is: the velocity v, or the clean image x.", one_of("v", "x"))
    width: int = setting(1152, "Channels of the transformer.", at_least(4, 2**16))
    depth: int = setting(28, "Transformer blocks.", at_least(1, 1024))
    num_heads: int = setting(16, "Attention heads; each has a multiple of 4 channels.", at_least(1, 1024))
    patch_size: int = setting(16, "Side of the patches that are the transformer's tokens, in pixels.", at_least(1, 512))
    num_classes: int = setting(1000, "Classes; 0 for text to image.", at_least(0, 1_000_000))
    text_width: int = setting(0, "Channels of the text features; 0 for class to image.", at_least(0, 2**16))
    text_length: int = setting(0, "Tokens of a caption; longer ones are cut.", at_least(0, 8192))
    text_depth: int = setting(0, "Blocks that refine the text features.", at_least(0, 1024))
    context_tokens: int = setting(
        0, "Tokens of the class that join the image's on the way (JiT's in-context conditioning).", at_least(0, 4096)
    )
    context_start: int = setting(0, "Blocks before which they join.", at_least(0, 1024))
    dropout: float = setting(
        0.0,
        "Share of the units that training drops in the middle half of the blocks.",
        Rule(lambda share: 0 <= share < 1, "from 0 to below 1"),
        computed=True,
    )
    dtype: str = setting(
        "bfloat16",
        "Precision of the computation; parameters are float32. float32 is exact on GPUs and TPUs too, and slow there.",
        one_of("bfloat16", "float32"),
        computed=True,
    )
    remat: str = setting(
        "auto",
        "What is recomputed in the backward pass. none: fastest, most memory; dots: all but matrix products; "
        "full: slowest, least memory; auto: the first of these whose compiled step fits.",
        one_of("auto", *REMAT_POLICIES),
        computed=True,
    )
    unroll: int = setting(1, "Blocks that are unrolled in the scan over them.", at_least(1, 1024), computed=True)
    attention: str = setting(
        "auto",
        "Implementation of attention. cudnn needs an NVIDIA GPU and bfloat16; auto: cudnn where it can be, else xla.",
        one_of("auto", "xla", "cudnn"),
        computed=True,
    )


class Trunk(nnx.Module):
    """Embeddings and blocks; what DeCo, the DiT baseline and PixNerd share.

    Conditioned on class labels (text_width = 0), or on a text's features: then refine blocks read the text,
    every block attends to it, and the condition is the time alone.

    Args:
        width, depth, num_heads: of the transformer; width / num_heads is a multiple of 4.
        patch_size: side of a patch in pixels; divides both image sides.
        num_classes: labels are 0..num_classes − 1, and num_classes means "no class".
        text_width, text_length, text_depth: channels and tokens of the text features; refine blocks, from 0 on.
        dtype: compute dtype.
        remat: name of a rematerialisation policy (`layers.REMAT_POLICIES`).
        unroll: blocks a scan iteration.
        attention: "xla" or "cudnn" (GPU, bfloat16).
        context_tokens: class tokens that join the image's before block `context_start` and leave after the last
            (in-context conditioning, Li & He 2025, JiT); class-to-image only.
        dropout: share of the units that training drops in the middle half of the blocks.
    """

    style = PLAIN

    def __init__(
        self,
        *,
        width: int,
        depth: int,
        num_heads: int,
        patch_size: int,
        num_classes: int = 0,
        text_width: int = 0,
        text_length: int = 0,
        text_depth: int = 0,
        dtype: Dtype = jnp.float32,
        remat: str = "none",
        unroll: int = 1,
        attention: Literal["xla", "cudnn"] = "xla",
        context_tokens: int = 0,
        context_start: int = 0,
        dropout: float = 0.0,
        rngs: nnx.Rngs,
    ) -> None:
        self.width, self.depth, self.patch_size, self.head_width = width, depth, patch_size, width // num_heads
        self.with_text = text_width > 0
        self.context_tokens, self.context_start, self.dropout = context_tokens, context_start, dropout
        self.dtype, self.remat, self.unroll = dtype, remat, unroll
        # Class-to-image: two thirds of 4·width, so that the gated MLP costs what a plain one would.
        mlp_hidden = 4 * width if self.with_text else int(2 * 4 * width / 3)

        def block(rngs: nnx.Rngs, with_text: bool) -> Block:
            return Block(
                width,
                num_heads,
                mlp_hidden,
                with_text=with_text,
                attention=attention,
                style=self.style,
                dtype=dtype,
                rngs=rngs,
            )

        self.make_embeddings(rngs)
        if self.with_text:
            self.text_embed = TextEmbedding(text_width, width, dtype=dtype, rngs=rngs)
            self.text_positions = nnx.Param(jax.random.normal(rngs.params(), (text_length, width)))
            self.text_depth = text_depth
            if text_depth:  # no array of a stack may be empty: checkpoints can't hold one
                self.text_blocks = stack(lambda rngs: block(rngs, False), text_depth, rngs)
        else:
            self.label_embed = nnx.Embed(
                num_classes + 1, width, embedding_init=initializers.normal(0.02), dtype=dtype, rngs=rngs
            )
        self.blocks = stack(lambda rngs: block(rngs, self.with_text), depth, rngs)
        if context_tokens:
            self.context_positions = nnx.Param(0.02 * jax.random.normal(rngs.params(), (context_tokens, width)))

    def make_embeddings(self, rngs: nnx.Rngs) -> None:
        """Make the layers that patches and times enter by."""
        self.patch_embed = Linear(
            3 * self.patch_size**2, self.width, kernel_init=xavier, bias_init=zeros, dtype=self.dtype, rngs=rngs
        )
        self.time_embed = TimestepEmbedding(self.width, dtype=self.dtype, rngs=rngs)

    def embed(self, patches: jax.Array, rows: int, columns: int) -> jax.Array:
        """Patches [batch, rows · columns, 3 · patch²] to the first hidden states [batch, rows · columns, width]."""
        return self.patch_embed(patches)

    def angles(self, rows: int, columns: int) -> np.ndarray:
        """The rotary embedding's angles of a grid of patches, float32 [rows · columns, head_width / 2]."""
        if self.with_text:
            # The reference scales each axis by the other one's length; equal for square images.
            xs, ys = np.linspace(0, rows, columns), np.linspace(0, columns, rows)
        else:
            xs, ys = np.linspace(0, 16, columns), np.linspace(0, 16, rows)
        return rotary_angles(xs, ys, self.head_width)

    def hidden(
        self,
        images: Images,
        times: PerExample,
        context: Labels | Text,
        aligned_layer: int | None = None,
        keys: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
        """The low-frequency pathway.

        Args:
            images: [batch, height, width, 3], noised, in about ±1.
            times: [batch] in [0, 1]; 0 is noise.
            context: labels int32 [batch], or text features [batch, text_length, text_width].
            aligned_layer: number of blocks after which to take the features that REPA aligns.
            keys: [batch], for dropout while training; None: nothing is dropped.

        Returns:
            hidden [batch, tokens, width]; time embedding [batch, width]; condition [batch, width];
            the aligned features [batch, tokens, width] or None.
        """
        _, height, width, _ = images.shape
        patches = patchify(images.astype(self.dtype), self.patch_size)
        rows, columns = height // self.patch_size, width // self.patch_size
        h = self.embed(patches.reshape(*patches.shape[:2], -1), rows, columns)
        time = self.time_embed(times)
        text = None
        if self.with_text:
            condition = jax.nn.silu(time)
            text = self.text_embed(context.astype(self.dtype)) + self.text_positions[...].astype(self.dtype)
            if self.text_depth:
                text = run_stack(
                    self.text_blocks,
                    text,
                    lambda block, y: block(y, condition, None),
                    dtype=self.dtype,
                    remat=self.remat,
                    unroll=self.unroll,
                )
        else:
            label = self.label_embed(context)
            condition = jax.nn.silu(time + label)
        angles = jnp.asarray(self.angles(rows, columns))
        tokens, aligned = h.shape[1], None

        def run(h: jax.Array, start: int, stop: int) -> jax.Array:
            drops = keys is not None and self.dropout and self.depth // 4 <= start < self.depth // 4 * 3

            def apply(block: Block, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
                h, index = carry
                dropout = None
                if drops:
                    dropout = Dropout(self.dropout, jax.vmap(lambda key: jax.random.fold_in(key, index))(keys))
                return block(h, condition, angles, text, dropout), index + 1

            h, _ = run_stack(
                self.blocks,
                (h, jnp.asarray(start)),
                apply,
                start=start,
                stop=stop,
                dtype=self.dtype,
                remat=self.remat,
                unroll=self.unroll,
            )
            return h

        # A scan for each stretch of equal blocks, so that one layer's output comes out without keeping every layer's.
        stops = {aligned_layer or 0, self.context_start if self.context_tokens else 0, self.depth}
        if keys is not None and self.dropout:
            stops |= {self.depth // 4, self.depth // 4 * 3}
        start = 0
        for stop in sorted(stops):
            if stop > start:
                h = run(h, start, stop)
            if aligned_layer and stop == aligned_layer:
                aligned = h[:, -tokens:]
            if self.context_tokens and stop == self.context_start:
                first = label[:, None] + self.context_positions[...].astype(self.dtype)
                h = jnp.concatenate([first, h], axis=1)
                angles = jnp.pad(angles, ((self.context_tokens, 0), (0, 0)))  # the class has no place in the image
            start = stop
        return h[:, -tokens:], time, condition, aligned


class TextEmbedding(nnx.Module):
    """RMSNorm(Linear(text)): [batch, length, text_width] → [batch, length, width]."""

    def __init__(self, text_width: int, width: int, *, dtype: Dtype, rngs: nnx.Rngs) -> None:
        self.proj = Linear(text_width, width, dtype=dtype, rngs=rngs)
        self.norm = RMSNorm(width)

    def __call__(self, text: jax.Array) -> jax.Array:
        return self.norm(self.proj(text))


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
        self.output = FinalLayer(self.width, self.patch_size, dtype=self.dtype, rngs=rngs)

    def __call__(
        self,
        images: Images,
        times: PerExample,
        context: Labels | Text,
        aligned_layer: int | None = None,
        keys: jax.Array | None = None,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """See `deco.DeCo.__call__`; "low_frequency" is the last block's output."""
        h, _, condition, aligned = self.hidden(images, times, context, aligned_layer, keys)
        patches = self.output(h, condition).astype(jnp.float32)
        patches = patches.reshape(*patches.shape[:2], self.patch_size**2, 3)
        images = unpatchify(patches, self.patch_size, *images.shape[1:3])
        return images, intermediates(low_frequency=h, aligned=aligned)


def intermediates(**arrays: jax.Array | None) -> dict[str, jax.Array]:
    """What a model returns beside its output, without the entries that were not asked for."""
    return {name: array for name, array in arrays.items() if array is not None}


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
