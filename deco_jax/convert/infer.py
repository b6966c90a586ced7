"""Infers the architecture of official tensors from their names and shapes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from deco_jax.errors import UserError


def model_of(tensors: Mapping[str, np.ndarray], what: str) -> dict[str, Any]:
    """Return the config's `model` section for a denoiser's tensors, given official names without `denoiser.`.

    Args:
        what: the file, for errors.

    Raises:
        UserError: they don't belong to a DeCo or DiT denoiser.
    """
    if "x_embedder.proj1.weight" in tensors:
        raise UserError(
            f"{what}: JiT's files don't say before which block the class tokens join; give its config=, as from "
            "configs/jit256.py or configs/pixelgen256.py"
        )
    patches = next((n for n in ("s_embedder.proj.weight", "x_embedder.proj.weight") if n in tensors), None)
    depth, attention = _count(tensors, "blocks"), "blocks.0.attn.q_norm.weight"
    if patches is None or attention not in tensors or any("param_generator" in name for name in tensors):
        raise UserError(f"{what}: not the tensors of a DeCo or DiT denoiser; give its config=")
    width, pixels = tensors[patches].shape
    model: dict[str, Any] = {
        "name": "deco" if "dec_net.input_proj.weight" in tensors else "dit",
        "width": width,
        "depth": depth,
        "num_heads": width // len(tensors[attention]),
        "patch_size": math.isqrt(pixels // 3),
    }
    if model["name"] == "deco":
        modulated = "dec_net.res_blocks.0.adaLN_modulation.1.weight" in tensors
        model |= {
            "decoder_width": len(tensors["dec_net.input_proj.weight"]),
            "decoder_depth": _count(tensors, "dec_net.res_blocks"),
            "decoder_interaction": "adaln" if modulated else "add",
        }
    if "y_embedder.embedding_table.weight" in tensors:
        return model | {"num_classes": len(tensors["y_embedder.embedding_table.weight"]) - 1}
    if "y_embedder.proj.weight" not in tensors or "y_pos_embedding" not in tensors:
        raise UserError(f"{what}: has neither a label table nor a text embedding; give its config=")
    return model | {
        "num_classes": 0,
        "text_width": tensors["y_embedder.proj.weight"].shape[1],
        "text_length": tensors["y_pos_embedding"].shape[1],
        "text_depth": _count(tensors, "text_refine_blocks"),
    }


def _count(tensors: Mapping[str, np.ndarray], prefix: str) -> int:
    """Count the blocks under a prefix."""
    numbers = [int(match[1]) for name in tensors if (match := re.match(rf"{re.escape(prefix)}\.(\d+)\.", name))]
    return max(numbers, default=-1) + 1
