"""Qwen3 from its Hugging Face folder: sizes from config.json, weights from safetensors."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from deco_jax.convert.mapping import MATRIX, TRANSPOSE, VECTOR, Row, to_ours
from deco_jax.convert.torch_files import read_safetensors, with_prefix_removed
from deco_jax.errors import UserError
from deco_jax.models.qwen3 import Sizes
from deco_jax.run import storage

# The output layer, tied to the embedding or its own: hidden states are taken before it.
IGNORED = ("lm_head.weight",)
WHERE = "download config.json, tokenizer.json and *.safetensors from huggingface.co/Qwen/Qwen3-1.7B"


def table(depth: int) -> list[Row]:
    """The rows of a Qwen3 of `depth` blocks; names without the `model.` in front."""
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
    """The shapes of all parameters, as a nested dictionary of ShapeDtypeStructs."""
    import jax
    from flax import nnx

    from deco_jax.models.qwen3 import Qwen3

    model = nnx.eval_shape(lambda: Qwen3(sizes, rngs=nnx.Rngs(0)))
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)


def from_torch(
    sizes: Sizes, tensors: Mapping[str, np.ndarray], *, dtype: Any = None, what: str = "the text encoder"
) -> dict[str, Any]:
    """Hugging Face's tensors, with or without `model.` in front, as our parameters.

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
    """The network's sizes from the folder's `config.json`.

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
    """The sizes of the network in a folder, whose weights are not read yet.

    Raises:
        UserError: the path isn't set or no folder (with where to get it), or as `read_sizes`.
    """
    if not folder:
        raise UserError(f"text-to-image needs Qwen3's folder, and config.text.path is empty; {WHERE}")
    if not storage.local(folder).is_dir():
        raise UserError(f"{folder}: no such folder, and Qwen3's weights should be there; {WHERE}")
    return read_sizes(storage.local(folder))


def load_encoder(folder: str | os.PathLike[str] | None, *, dtype: Any = None) -> tuple[Sizes, dict[str, Any]]:
    """Sizes and parameters of `models.qwen3.Qwen3` from a Hugging Face folder.

    Tensors are read one at a time, so the memory needed is the parameters' own.

    Args:
        folder: holds config.json and model.safetensors, or model.safetensors.index.json and its files.
        dtype: of the matrices; None keeps the file's (bfloat16 as published). Norm scales are float32.

    Raises:
        UserError: something is missing (with where to get it), damaged, or doesn't fit config.json.
    """
    sizes = check_encoder(folder)
    assert folder is not None
    return sizes, from_torch(sizes, read_safetensors(storage.local(folder)), dtype=dtype, what=str(folder))
