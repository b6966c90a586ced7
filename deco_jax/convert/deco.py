"""DeCo, its baselines and the REPA projector: the official checkpoints' tensors ↔ our parameters.

The official code holds images as [batch, 3, height, width] and flattens a patch channel first
(index c·P² + row·P + column); ours are [batch, height, width, 3] and a patch is (row, column, channel).
Everything else differs by a transposition only. Source: the parameter names of the published DeCo
checkpoints (arXiv 2511.19365).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from deco_jax.convert.mapping import DROP_FIRST, MATRIX, TRANSPOSE, VECTOR, Row, Transform, halves, one_to_one, to_ours
from deco_jax.convert.mapping import to_torch as table_to_torch
from deco_jax.errors import UserError

PROJECTOR: list[Row] = [
    Row(f"0.{index}.{torch}", f"{name}.{ours}", transform)
    for index, name in ((0, "first"), (2, "second"), (4, "third"))
    for torch, ours, transform in (("weight", "kernel", TRANSPOSE), ("bias", "bias", VECTOR))
]


def patch_in(patch: int) -> Transform:
    """[width, (channel, row, column)] to [(row, column, channel), width]."""
    return one_to_one(
        f"a Linear from {patch}×{patch} patches",
        2,
        lambda w: w.reshape(len(w), 3, patch, patch).transpose(2, 3, 1, 0).reshape(3 * patch**2, -1),
        lambda k: k.reshape(patch, patch, 3, k.shape[1]).transpose(3, 2, 0, 1).reshape(-1, 3 * patch**2),
    )


def patch_out(patch: int) -> Transform:
    """[(channel, row, column), width] to [width, (row, column, channel)]."""
    return one_to_one(
        f"a Linear to {patch}×{patch} patches",
        2,
        lambda w: w.reshape(3, patch, patch, w.shape[1]).transpose(3, 1, 2, 0).reshape(-1, 3 * patch**2),
        lambda k: k.reshape(len(k), patch, patch, 3).transpose(3, 1, 2, 0).reshape(3 * patch**2, -1),
    )


def patch_out_bias(patch: int) -> Transform:
    """[(channel, row, column)] to [(row, column, channel)]."""
    return one_to_one(
        f"the bias of a Linear to {patch}×{patch} patches",
        1,
        lambda b: b.reshape(3, patch, patch).transpose(1, 2, 0).ravel(),
        lambda b: b.reshape(patch, patch, 3).transpose(2, 0, 1).ravel(),
    )


def _linear(torch: str, ours: str, **blocks: Any) -> list[Row]:
    return [
        Row(f"{torch}.weight", f"{ours}.kernel", TRANSPOSE, **blocks),
        Row(f"{torch}.bias", f"{ours}.bias", VECTOR, **blocks),
    ]


def _blocks(torch: str, ours: str, count: int, *, fused_mlp: bool, text_keys: bool) -> list[Row]:
    """Transformer blocks; class-to-image has separate gate and up matrices, text-to-image one matrix of both."""
    torch, many = f"{torch}.{{i}}", {"count": count}
    qkv = "qkv_x" if text_keys else "qkv"
    rows = [
        Row(f"{torch}.norm1.weight", f"{ours}.norm1.scale", VECTOR, **many),
        Row(f"{torch}.attn.{qkv}.weight", f"{ours}.attention.qkv.kernel", TRANSPOSE, **many),
        Row(f"{torch}.attn.q_norm.weight", f"{ours}.attention.q_norm.scale", VECTOR, **many),
        Row(f"{torch}.attn.k_norm.weight", f"{ours}.attention.k_norm.scale", VECTOR, **many),
        *_linear(f"{torch}.attn.proj", f"{ours}.attention.out", **many),
        Row(f"{torch}.norm2.weight", f"{ours}.norm2.scale", VECTOR, **many),
        *_linear(f"{torch}.adaLN_modulation.0", f"{ours}.modulation", **many),
    ]
    if text_keys:
        rows.append(Row(f"{torch}.attn.kv_y.weight", f"{ours}.attention.text_kv.kernel", TRANSPOSE, **many))
    gate, up, down = (f"{ours}.mlp.{name}.kernel" for name in ("gate", "up", "down"))
    if fused_mlp:
        rows.append(Row(f"{torch}.mlp.w12.weight", (gate, up), halves(), **many))
        rows.append(Row(f"{torch}.mlp.w3.weight", down, TRANSPOSE, **many))
    else:
        rows.append(Row(f"{torch}.mlp.w1.weight", gate, TRANSPOSE, **many))
        rows.append(Row(f"{torch}.mlp.w3.weight", up, TRANSPOSE, **many))
        rows.append(Row(f"{torch}.mlp.w2.weight", down, TRANSPOSE, **many))
    return rows


def _deco_decoder(depth: int, modulated: bool) -> list[Row]:
    block, many = "dec_net.res_blocks.{i}", {"count": depth}
    rows = [
        *_linear("x_embedder.embedder.0", "decoder.pixel_embed"),
        *_linear("dec_net.cond_embed", "decoder.condition"),
        *_linear("dec_net.input_proj", "decoder.input"),
        Row(f"{block}.in_ln.weight", "decoder.blocks.norm.scale", VECTOR, **many),
        Row(f"{block}.in_ln.bias", "decoder.blocks.norm.bias", VECTOR, **many),
        *_linear(f"{block}.mlp.0", "decoder.blocks.mlp_in", **many),
        *_linear(f"{block}.mlp.2", "decoder.blocks.mlp_out", **many),
        *_linear("dec_net.final_layer.linear", "decoder.output"),
    ]
    if modulated:
        rows += _linear(f"{block}.adaLN_modulation.1", "decoder.blocks.modulation", **many)
    return rows


def _pixnerd_decoder(first: int, depth: int) -> list[Row]:
    """The decoder's blocks are numbered on from the transformer's."""
    many = {"count": depth, "first": first}
    return [
        *_linear("x_embedder.embedder.0", "decoder.pixel_embed"),
        *_linear("blocks.{i}.param_generator1.0", "decoder.blocks.generator", **many),
        Row("blocks.{i}.norm.weight", "decoder.blocks.norm.scale", VECTOR, **many),
        Row("final_layer.norm.weight", "decoder.norm.scale", VECTOR),
        *_linear("final_layer.linear", "decoder.output"),
    ]


def table(model: Any) -> list[Row]:
    """The rows of a denoiser.

    Args:
        model: the config's `model` section: `name` ("deco", "dit" or "pixnerd"), `depth`, `patch_size`;
            `decoder_depth` except for "dit"; `text_width` or `text_depth` above 0 for text-to-image;
            `decoder_interaction`, "adaln" unless set.

    Raises:
        UserError: no such model.
    """
    text_depth = getattr(model, "text_depth", 0)
    text = bool(text_depth or getattr(model, "text_width", 0))
    patch = model.patch_size
    embedder = "x_embedder.proj" if model.name == "dit" else "s_embedder.proj"
    rows = [
        Row(f"{embedder}.weight", "patch_embed.kernel", patch_in(patch)),
        Row(f"{embedder}.bias", "patch_embed.bias", VECTOR),
        *_linear("t_embedder.mlp.0", "time_embed.hidden"),
        *_linear("t_embedder.mlp.2", "time_embed.out"),
        *_blocks("blocks", "blocks", model.depth, fused_mlp=text, text_keys=text),
    ]
    if text:
        rows += _linear("y_embedder.proj", "text_embed.proj")
        rows.append(Row("y_embedder.norm.weight", "text_embed.norm.scale", VECTOR))
        rows.append(Row("y_pos_embedding", "text_positions", DROP_FIRST))
        if text_depth:
            rows += _blocks("text_refine_blocks", "text_blocks", text_depth, fused_mlp=True, text_keys=False)
    else:
        rows.append(Row("y_embedder.embedding_table.weight", "label_embed.embedding", MATRIX))

    if model.name == "deco":
        rows += _deco_decoder(model.decoder_depth, getattr(model, "decoder_interaction", "adaln") == "adaln")
    elif model.name == "pixnerd":
        rows += _pixnerd_decoder(model.depth, model.decoder_depth)
    elif model.name == "dit":
        rows += _linear("final_layer.adaLN_modulation.0", "output.modulation")
        rows.append(Row("final_layer.linear.weight", "output.linear.kernel", patch_out(patch)))
        rows.append(Row("final_layer.linear.bias", "output.linear.bias", patch_out_bias(patch)))
    else:
        raise UserError(f"config.model.name={model.name!r} has no official weights' table; use deco, dit or pixnerd")
    return rows


def from_torch(
    model: Any,
    tensors: Mapping[str, np.ndarray],
    *,
    like: Mapping[str, Any] | None = None,
    dtype: Any = None,
    what: str = "the checkpoint",
) -> dict[str, Any]:
    """A denoiser's official tensors (names without `denoiser.`) as our parameters; see `mapping.to_ours`.

    Args:
        dtype: of all parameters; None keeps the file's.
    """
    return to_ours(table(model), tensors, like=like, dtype=dtype and (lambda _: dtype), what=what)


def to_torch(model: Any, params: Mapping[str, Any], *, consume: bool = False) -> dict[str, np.ndarray]:
    """Our parameters of a denoiser under the official names and layouts; undoes `from_torch`.

    Args:
        consume: see `mapping.to_torch`.
    """
    return table_to_torch(table(model), params, consume=consume)


def projector_from_torch(
    tensors: Mapping[str, np.ndarray],
    *,
    like: Mapping[str, Any] | None = None,
    dtype: Any = None,
    what: str = "the checkpoint",
) -> dict[str, Any]:
    """The REPA projector's official tensors (names without `diffusion_trainer.proj.`) as our parameters."""
    return to_ours(PROJECTOR, tensors, like=like, dtype=dtype and (lambda _: dtype), what=what)


def projector_to_torch(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Our projector's parameters under the official names; undoes `projector_from_torch`."""
    return table_to_torch(PROJECTOR, params)
