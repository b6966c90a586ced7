"""Qwen3, the frozen language model whose last hidden states condition text-to-image models; and its folder.

Source: Qwen3 technical report (Yang et al. 2025): a decoder-only transformer with RMSNorm, grouped-query
attention, normalised queries and keys, rotary positions and SwiGLU. Inference only, no cache.
"""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.nn import initializers

from deco_jax.convert.mapping import MATRIX, TRANSPOSE, VECTOR, Row, to_ours
from deco_jax.convert.torch_files import read_safetensors, with_prefix_removed
from deco_jax.errors import UserError
from deco_jax.models.layers import Dtype, Linear, RMSNorm, SwiGLU, run_stack, stack
from deco_jax.models.network import FrozenNetwork, Params, functional
from deco_jax.run import fetch


@dataclass(frozen=True)
class Sizes:
    """Qwen3-1.7B unless told otherwise; `read_sizes` reads them from a `config.json`."""

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
        """Return the states after the last norm, padding's too.

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


def text_encoder(sizes: Sizes, path: str, dtype: str, width: int) -> FrozenNetwork:
    """Return Qwen3 as a text encoder: (params, tokens, mask) → bfloat16 [batch, length, width].

    Args:
        path: of its folder.
        dtype: that its matrices are kept and multiplied in; norm scales are float32.
        width: channels that the features are cut to, or filled up to with zeros.
    """
    kind = jnp.dtype(dtype)
    network = functional(lambda rngs: Qwen3(sizes, dtype=kind, rngs=rngs), kind)

    def kept(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, jnp.float32 if path[-1].key == "scale" else kind)

    def apply(params: Params, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        return fit(network.apply(params, tokens, mask), width).astype(jnp.bfloat16)

    return FrozenNetwork(
        apply,
        jax.tree_util.tree_map_with_path(kept, network.shapes),
        lambda: load_encoder(path, dtype=kind)[1],
        functools.partial(flops, sizes),
    )


def fit(features: jax.Array, width: int) -> jax.Array:
    """Cut features [..., the encoder's width] to [..., width], or fill them up with zeros."""
    missing = width - features.shape[-1]
    if missing <= 0:
        return features[..., :width]
    return jnp.pad(features, [(0, 0)] * (features.ndim - 1) + [(0, missing)])


def flops(sizes: Sizes, length: int) -> float:
    """Count the FLOPs of a forward pass on one caption of `length` tokens; masked products count."""
    inner, kv_inner = sizes.num_heads * sizes.head_width, sizes.num_kv_heads * sizes.head_width
    projections = sizes.width * (2 * inner + 2 * kv_inner + 3 * sizes.mlp_hidden)
    return 2.0 * sizes.depth * length * (projections + 2 * length * inner)


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


# ---------------------------------------------------------------------------------------- the official weights

# The output layer, tied to the embedding or its own: hidden states are taken before it.
IGNORED = ("lm_head.weight",)
WHERE = "download config.json, tokenizer.json and *.safetensors from huggingface.co/Qwen/Qwen3-1.7B"


def table(depth: int) -> list[Row]:
    """Return the rows of a Qwen3 of `depth` blocks; names without the `model.` in front."""
    many, block = {"count": depth}, "layers.{i}"
    attention = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "o_proj"}
    mlp = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
    return [
        Row("embed_tokens.weight", "embed.embedding", MATRIX),
        Row(f"{block}.input_layernorm.weight", "blocks.norm1.scale", VECTOR, **many),
        *(
            Row(f"{block}.self_attn.{torch}.weight", f"blocks.attention.{ours}.kernel", TRANSPOSE, **many)
            for ours, torch in attention.items()
        ),
        Row(f"{block}.self_attn.q_norm.weight", "blocks.attention.q_norm.scale", VECTOR, **many),
        Row(f"{block}.self_attn.k_norm.weight", "blocks.attention.k_norm.scale", VECTOR, **many),
        Row(f"{block}.post_attention_layernorm.weight", "blocks.norm2.scale", VECTOR, **many),
        *(
            Row(f"{block}.mlp.{torch}.weight", f"blocks.mlp.{ours}.kernel", TRANSPOSE, **many)
            for ours, torch in mlp.items()
        ),
        Row("norm.weight", "norm.scale", VECTOR),
    ]


def shapes(sizes: Sizes) -> dict[str, Any]:
    """Return the shapes of all parameters, as a nested dictionary of ShapeDtypeStructs."""
    model = nnx.eval_shape(lambda: Qwen3(sizes, rngs=nnx.Rngs(0)))
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)


def from_torch(
    sizes: Sizes, tensors: Mapping[str, np.ndarray], *, dtype: Any = None, what: str = "the text encoder"
) -> dict[str, Any]:
    """Return Hugging Face's tensors, with or without `model.` in front, as our parameters.

    Args:
        dtype: of the matrices; None keeps the file's. Norm scales are float32.

    Raises:
        UserError: tensors are missing, left over, or of other sizes.
    """
    renamed = with_prefix_removed(tensors, "model.")
    sample = "layers.0.self_attn.k_proj.weight"  # a small matrix, to learn the file's dtype from
    matrices = dtype or (renamed[sample].dtype if sample in renamed else np.float32)
    return to_ours(
        table(sizes.depth),
        renamed,
        like=shapes(sizes),
        dtype=lambda path: np.float32 if path.endswith(".scale") else matrices,
        ignore=IGNORED,
        what=what,
    )


def read_sizes(folder: str | os.PathLike[str]) -> Sizes:
    """Read the network's sizes from the folder's `config.json`.

    Raises:
        UserError: the file is missing, damaged, or describes a network that isn't a plain Qwen3.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise UserError(f"{path}: no such file, and the text encoder's sizes are in it; {WHERE}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        unsupported = {
            "model_type": config["model_type"] != "qwen3",
            "hidden_act": config.get("hidden_act", "silu") != "silu",
            "attention_bias": bool(config.get("attention_bias", False)),
            "use_sliding_window": bool(config.get("use_sliding_window", False)),
            "rope_scaling": rope.get("rope_type", rope.get("type", "default")) != "default",
        }
        sizes = Sizes(
            vocabulary=int(config["vocab_size"]),
            width=int(config["hidden_size"]),
            mlp_hidden=int(config["intermediate_size"]),
            depth=int(config["num_hidden_layers"]),
            num_heads=int(config["num_attention_heads"]),
            num_kv_heads=int(config["num_key_value_heads"]),
            head_width=int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]),
            rope_theta=float(config["rope_theta"] if "rope_theta" in config else rope["rope_theta"]),
            norm_epsilon=float(config["rms_norm_eps"]),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: no readable Qwen3 configuration ({error!r}); {WHERE}") from error
    wrong = [key for key, is_wrong in unsupported.items() if is_wrong]
    if wrong:
        described = ", ".join(f"{key}={config.get(key)!r}" for key in wrong)
        raise UserError(f"{path}: {described} isn't supported; use a dense Qwen3 such as Qwen/Qwen3-1.7B")
    return sizes


def check_encoder(folder: str | os.PathLike[str] | None) -> Sizes:
    """Read the sizes of the network in a folder, whose weights are not read yet.

    Raises:
        UserError: the path isn't set or no folder (with where to get it), or as `read_sizes`.
    """
    if not folder:
        raise UserError(f"text-to-image needs Qwen3's folder, and config.text.path is empty; {WHERE}")
    if not fetch.local(folder).is_dir():
        raise UserError(f"{folder}: no such folder, and Qwen3's weights should be there; {WHERE}")
    return read_sizes(fetch.local(folder))


def load_encoder(folder: str | os.PathLike[str] | None, *, dtype: Any = None) -> tuple[Sizes, dict[str, Any]]:
    """Read sizes and parameters of `Qwen3` from a Hugging Face folder.

    Tensors are read one at a time, so the memory needed is the parameters' own.

    Args:
        folder: holds config.json and model.safetensors, or model.safetensors.index.json and its files.
        dtype: of the matrices; None keeps the file's (bfloat16 as published). Norm scales are float32.

    Raises:
        UserError: something is missing (with where to get it), damaged, or doesn't fit config.json.
    """
    sizes = check_encoder(folder)
    assert folder is not None
    return sizes, from_torch(sizes, read_safetensors(fetch.local(folder)), dtype=dtype, what=str(folder))
