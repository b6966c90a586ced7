"""What the models around a transformer have in common besides the module: FLOPs, sharding, official names.

The official code holds images as [batch, 3, height, width] and flattens a patch channel first
(index c·P² + row·P + column); ours are [batch, height, width, 3] and a patch is (row, column, channel).
Everything else differs by a transposition only. Source: the parameter names of the published DeCo
checkpoints (arXiv 2511.19365).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from flax import nnx

from deco_jax.convert.mapping import DROP_FIRST, MATRIX, TRANSPOSE, VECTOR, Row, Transform, halves, one_to_one

# (pattern, the dimension that is split along "fsdp"; None: kept whole); see `run.sharding`.
Rules = tuple[tuple[str, int | None], ...]


class Architecture(NamedTuple):
    """All that is known of a denoiser; registered by a line in `models.network`.

    module: called with the entries of config.model but `name` and `prediction`, and rngs
    settings: the dataclass of its section of the config
    flops: (config.model, height, width) → multiply-adds of a forward pass on one image, by part
    rules: how its parameters are split; the first whose pattern is found in a parameter's path
    table: (config.model) → the rows of its official checkpoints
    """

    module: Callable[..., nnx.Module]
    settings: type
    flops: Callable[[Mapping[str, Any], int, int], dict[str, float]]
    rules: Rules
    table: Callable[[Mapping[str, Any]], list[Row]]


# Always the model's width (or a multiple of it), which divides by any sensible number of devices, unlike the
# 1001 labels or the 2730 hidden units.
RULES: Rules = (
    (r"(qkv|text_kv|gate|up)/kernel$", -2),  # [depth, width, ...]
    (r"(attention/out|down|modulation)/kernel$", -1),  # [depth, ..., width]
    (r"(patch_embed|patch_reduce|time_embed/\w+|text_embed/proj)/kernel$", -1),
    (r"(label_embed/embedding|text_positions|context_positions)$", -1),
    (r"output/linear/kernel$", -2),
)


def trunk_flops(model: Mapping[str, Any], height: int, width_px: int) -> dict[str, float]:
    """Count the multiply-adds of embeddings and blocks (`dit.Trunk`)."""
    patch, width, depth = model["patch_size"], model["width"], model["depth"]
    tokens = height * width_px // patch**2
    text = model["text_length"] if model["text_width"] else 0
    hidden = 4 * width if text else int(2 * 4 * width / 3)
    # Class tokens are there from a block on.
    joined = model.get("context_tokens", 0)
    with_class = depth - model.get("context_start", 0) if joined else 0
    rows = depth * tokens + with_class * joined
    pairs = (depth - with_class) * tokens * (tokens + text) + with_class * (tokens + joined) ** 2
    parts: dict[str, float] = {
        "embeddings": tokens * 3 * patch**2 * width + 256 * width + width**2,  # patches, time
        "modulation": depth * 6 * width**2,
        "projections": rows * 4 * width**2,
        "attention": 2 * pairs * width,
        "mlp": rows * 3 * width * hidden,
    }
    if text:
        block = text * (4 * width**2 + 2 * text * width + 3 * width * hidden) + 6 * width**2
        parts["embeddings"] += text * model["text_width"] * width
        parts["projections"] += depth * text * 2 * width**2
        parts["text_blocks"] = model["text_depth"] * block
    return parts


def trunk_rows(model: Mapping[str, Any], embedder: str) -> list[Row]:
    """Return the rows of embeddings and blocks.

    Args:
        model: `depth` and `patch_size`; `text_width` or `text_depth` above 0 for text to image.
        embedder: the official name of the patches' Linear.
    """
    text_depth = model.get("text_depth", 0)
    text = bool(text_depth or model.get("text_width", 0))
    rows = [
        Row(f"{embedder}.weight", "patch_embed.kernel", patch_in(model["patch_size"])),
        Row(f"{embedder}.bias", "patch_embed.bias", VECTOR),
        *linear_rows("t_embedder.mlp.0", "time_embed.hidden"),
        *linear_rows("t_embedder.mlp.2", "time_embed.out"),
        *_blocks("blocks", "blocks", model["depth"], fused_mlp=text, text_keys=text),
    ]
    if not text:
        return [*rows, Row("y_embedder.embedding_table.weight", "label_embed.embedding", MATRIX)]
    rows += linear_rows("y_embedder.proj", "text_embed.proj")
    rows.append(Row("y_embedder.norm.weight", "text_embed.norm.scale", VECTOR))
    rows.append(Row("y_pos_embedding", "text_positions", DROP_FIRST))
    if text_depth:
        rows += _blocks("text_refine_blocks", "text_blocks", text_depth, fused_mlp=True, text_keys=False)
    return rows


def linear_rows(torch: str, ours: str, **blocks: Any) -> list[Row]:
    """Return the rows of a Linear's matrix and bias."""
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
        *linear_rows(f"{torch}.attn.proj", f"{ours}.attention.out", **many),
        Row(f"{torch}.norm2.weight", f"{ours}.norm2.scale", VECTOR, **many),
        *linear_rows(f"{torch}.adaLN_modulation.0", f"{ours}.modulation", **many),
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
