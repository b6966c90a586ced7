"""The transformer that the models share: embeddings and blocks; DeCo's low-frequency half.

    images ─ patchify ─ Linear ─┐
    times ─ TimestepEmbedding ──┼─ blocks (scan) ─ hidden [batch, tokens, width] ─ a head: DeCo, DiT, PixNerd
    labels or text ─────────────┘

Its FLOPs and sharding rules stand below it. Source: DeCo (arXiv 2511.19365).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.nn import initializers

from deco_jax.models import class_token
from deco_jax.models.architecture import Rules
from deco_jax.models.blocks import PLAIN, Block, Dropout, TextEmbedding
from deco_jax.models.class_token import ClassToken
from deco_jax.models.jumps import STILL, JumpEmbedding
from deco_jax.models.layers import (
    REMAT_POLICIES,
    Dtype,
    Linear,
    TimestepEmbedding,
    patchify,
    rotary_angles,
    run_stack,
    stack,
    xavier,
    zeros,
)
from deco_jax.schema import Rule, at_least, one_of, setting
from deco_jax.shapes import Images, Labels, PerExample, Text


@dataclasses.dataclass(frozen=True)
class TrunkSettings:
    """The settings of the transformer, which every model here has; see `schema.setting`."""

    prediction: str = setting(
        "v",
        "What the output is: v, the velocity; x, the clean image; or asymmetric, the velocity within a subspace of the "
        "patches and the image outside it.",
        one_of("v", "x", "asymmetric"),
    )
    asymmetric_rank: int = setting(
        8, "Dimension of that subspace, 0 to 3·patch_size²; it is measured once, on the data.", at_least(0, 2**20)
    )
    width: int = setting(1152, "Channels of the transformer.", at_least(4, 2**16))
    depth: int = setting(28, "Transformer blocks.", at_least(1, 1024))
    num_heads: int = setting(16, "Attention heads; each has a multiple of 4 channels.", at_least(1, 1024))
    patch_size: int = setting(
        16, "Side of the patches that form the transformer's tokens, in pixels.", at_least(1, 512)
    )
    num_classes: int = setting(1000, "Classes; 0 for text to image.", at_least(0, 1_000_000))
    text_width: int = setting(0, "Channels of the text features; 0 for class to image.", at_least(0, 2**16))
    text_length: int = setting(0, "Tokens of a caption; longer ones are cut.", at_least(0, 8192))
    text_depth: int = setting(0, "Blocks that refine the text features.", at_least(0, 1024))
    context_tokens: int = setting(
        0,
        "Class tokens that join the image's tokens at context_start (JiT's in-context conditioning).",
        at_least(0, 4096),
    )
    context_start: int = setting(0, "Number of blocks before the class tokens join.", at_least(0, 1024))
    class_token: int = setting(
        0, "Channels of the teacher's class token that is denoised with the image (REG); 0: none.", at_least(0, 2**16)
    )
    mean_velocity: bool = setting(
        False, "Give the model the jump's length, the guidance and a second head, for MeanFlow (loss.mean_flow)."
    )
    dropout: float = setting(
        0.0,
        "Dropout in training, in the middle half of the blocks: share of the units.",
        Rule(lambda share: 0 <= share < 1, "from 0 to below 1"),
        computed=True,
    )
    dtype: str = setting(
        "bfloat16",
        "Precision of the computation; parameters are float32. float32 is also exact on GPUs and TPUs, but slow there.",
        one_of("bfloat16", "float32"),
        computed=True,
    )
    remat: str = setting(
        "auto",
        "What the backward pass recomputes. none: nothing, which takes the most memory; dots: all but matrix products; "
        "attention: all but the outputs of attention and MLP and, where the kernel for TPUs isn't used, attention's "
        "queries, keys and values; full: everything, which takes the least memory; auto: the first of these whose "
        "compiled step fits, on TPUs the one with the fewest estimated cycles.",
        one_of("auto", *REMAT_POLICIES),
        computed=True,
    )
    unroll: int = setting(1, "Blocks to unroll in the scan over blocks.", at_least(1, 1024), computed=True)
    attention: str = setting(
        "auto",
        "Implementation of attention. cudnn needs an NVIDIA GPU and bfloat16; auto: cudnn if possible, our own kernel "
        "on TPUs, otherwise xla.",
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
        attention: "xla", "cudnn" (GPU, bfloat16), or "auto": the kernel for TPUs on those, XLA's elsewhere.
        context_tokens: class tokens that join the image's before block `context_start` and leave after the last
            (in-context conditioning, Li & He 2025, JiT); class-to-image only.
        dropout: share of the units that training drops in the middle half of the blocks.
        mean_velocity: see `jumps.JumpEmbedding`; a model then returns its second head's output as "velocity".
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
        attention: Literal["auto", "xla", "cudnn"] = "xla",
        context_tokens: int = 0,
        context_start: int = 0,
        class_token: int = 0,
        dropout: float = 0.0,
        mean_velocity: bool = False,
        rngs: nnx.Rngs,
    ) -> None:
        self.width, self.depth, self.patch_size, self.head_width = width, depth, patch_size, width // num_heads
        self.with_text = text_width > 0
        self.context_tokens, self.context_start, self.dropout = context_tokens, context_start, dropout
        self.dtype, self.remat, self.unroll, self.mean_velocity = dtype, remat, unroll, mean_velocity
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
        self.class_token = class_token
        if class_token:
            self.extra_token = ClassToken(width, class_token, dtype=dtype, rngs=rngs)
        if mean_velocity:
            self.jump_embed = JumpEmbedding(width, period=self.time_embed.period, dtype=dtype, rngs=rngs)

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
        """Return the rotary embedding's angles of a grid of patches, float32 [rows · columns, head_width / 2]."""
        if self.with_text:
            # The reference scales each axis by the other one's length; equal for square images.
            xs, ys = np.linspace(0, rows, columns), np.linspace(0, columns, rows)
        else:
            xs, ys = np.linspace(0, 16, columns), np.linspace(0, 16, rows)
        return rotary_angles(xs, ys, self.head_width)

    def __call__(
        self,
        images: Images,
        times: PerExample,
        context: Labels | Text,
        aligned_layer: int | None = None,
        keys: jax.Array | None = None,
        jump: jax.Array | None = None,
        class_token: jax.Array | None = None,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Predict the velocity (or the clean image) of noised images.

        Args:
            images: [batch, height, width, 3], noised; sides are multiples of the patch size.
            times: [batch] in [0, 1]; 0 is noise, 1 is data.
            context: labels int32 [batch] (num_classes: no class), or text features [batch, length, text_width].
            aligned_layer: blocks after which to take the features that REPA aligns; None: don't.
            keys: [batch], for dropout while training; None: nothing is dropped.
            jump: [batch, 4], see `jumps.JumpEmbedding`, with mean_velocity; None: of length 0, without guidance.
            class_token: [batch, channels], noised like the images, where the model has one.

        Returns:
            The prediction, float32 [batch, height, width, 3], and the intermediates by name: "low_frequency" [batch,
            tokens, width], what the head is conditioned on (DeCo's Fig. 4: DiT output), and "aligned" [batch, tokens,
            width] if asked for, the second head's "velocity", of the images' shape, and the class token's,
            "token_velocity" [batch, channels].
        """
        h, time, condition, aligned = self.hidden(images, times, context, aligned_layer, keys, jump, class_token)
        token_velocity = None
        if self.class_token:
            token_velocity = self.extra_token.velocity(h[:, 0], condition)
            h = h[:, 1:]
        prediction, low_frequency = self.head(images, h, time, condition)
        velocity = self.head(images, h, time, condition, second=True)[0] if self.mean_velocity else None
        found = {
            "low_frequency": low_frequency,
            "aligned": aligned,
            "velocity": velocity,
            "token_velocity": token_velocity,
        }
        return prediction, {name: array for name, array in found.items() if array is not None}

    def head(
        self, images: Images, h: jax.Array, time: jax.Array, condition: jax.Array, second: bool = False
    ) -> tuple[jax.Array, jax.Array]:
        """Turn the last hidden states into the prediction; each model has its own.

        Args:
            images: [batch, height, width, 3], noised.
            h: [batch, tokens, width].
            time, condition: [batch, width], see `hidden`.
            second: by the head that mean_velocity adds.

        Returns:
            float32 [batch, height, width, 3], and what of the hidden states it was made from, [batch, tokens, width].
        """
        raise NotImplementedError

    def hidden(
        self,
        images: Images,
        times: PerExample,
        context: Labels | Text,
        aligned_layer: int | None = None,
        keys: jax.Array | None = None,
        jump: jax.Array | None = None,
        class_token: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
        """Run embeddings and blocks, the low-frequency pathway; arguments as of `__call__`.

        Returns:
            hidden [batch, tokens, width], the class token first where there is one; time embedding [batch, width];
            condition [batch, width]; the aligned features [batch, tokens, width] or None.
        """
        _, height, width, _ = images.shape
        patches = patchify(images.astype(self.dtype), self.patch_size)
        rows, columns = height // self.patch_size, width // self.patch_size
        h = self.embed(patches.reshape(*patches.shape[:2], -1), rows, columns)
        time = self.time_embed(times)
        if self.mean_velocity:
            still = jnp.tile(jnp.asarray(STILL, jnp.float32), (len(images), 1))
            time = time + self.jump_embed(still if jump is None else jump)
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
        if self.class_token:
            if class_token is None:
                raise ValueError(f"this model denoises a class token too; give it, [batch, {self.class_token}]")
            h = jnp.concatenate([self.extra_token.enter(class_token), h], axis=1)
            angles = jnp.pad(angles, ((1, 0), (0, 0)))  # nor has it a place in the image

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
        return h[:, -tokens - bool(self.class_token) :], time, condition, aligned


# ---------------------------------------------------------------------------------------- its facts

# Always the model's width (or a multiple of it), which divides by any sensible number of devices, unlike the
# 1001 labels or the 2730 hidden units.
RULES: Rules = (
    *class_token.RULES,
    (r"(qkv|text_kv|gate|up)/kernel$", -2),  # [depth, width, ...]
    (r"(attention/out|down|modulation)/kernel$", -1),  # [depth, ..., width]
    (r"(patch_embed|patch_reduce|(time|jump)_embed/\w+|text_embed/proj)/kernel$", -1),
    (r"(label_embed/embedding|text_positions|context_positions)$", -1),
    (r"output/linear/kernel$", -2),
)


def trunk_flops(model: Mapping[str, Any], height: int, width_px: int) -> dict[str, float]:
    """Count the multiply-adds of embeddings and blocks (`Trunk`)."""
    patch, width, depth = model["patch_size"], model["width"], model["depth"]
    patches, extra = height * width_px // patch**2, model.get("class_token", 0)
    tokens = patches + bool(extra)
    text = model["text_length"] if model["text_width"] else 0
    hidden = 4 * width if text else int(2 * 4 * width / 3)
    # Class tokens are there from a block on.
    joined = model.get("context_tokens", 0)
    with_class = depth - model.get("context_start", 0) if joined else 0
    rows = depth * tokens + with_class * joined
    pairs = (depth - with_class) * tokens * (tokens + text) + with_class * (tokens + joined) ** 2
    parts: dict[str, float] = {
        "embeddings": patches * 3 * patch**2 * width + 256 * width + width**2,  # patches, time
        "modulation": depth * 6 * width**2,
        "projections": rows * 4 * width**2,
        "attention": 2 * pairs * width,
        "mlp": rows * 3 * width * hidden,
    }
    if extra:
        parts["class_token"] = class_token.flops(width, extra)
    if text:
        block = text * (4 * width**2 + 2 * text * width + 3 * width * hidden) + 6 * width**2
        parts["embeddings"] += text * model["text_width"] * width
        parts["projections"] += depth * text * 2 * width**2
        parts["text_blocks"] = model["text_depth"] * block
    return parts
