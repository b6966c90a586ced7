"""CLIP, two frozen transformers that put images and texts into one space (Radford et al. 2021).

Weights, sizes and tokenizer come from a Hugging Face folder: config.json, model.safetensors, tokenizer.json. Inference
only.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.nn import initializers

from deco_jax.convert.mapping import MATRIX, TRANSPOSE, VECTOR, Row, to_ours
from deco_jax.convert.torch_files import read_safetensors
from deco_jax.errors import UserError, reason
from deco_jax.models.layers import Dtype, LayerNorm, Linear, patchify, run_stack, stack
from deco_jax.models.network import functional
from deco_jax.models.official_names import linear_rows
from deco_jax.models.vit import convolution, joined_rows, norm_rows

MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
WHERE = "download config.json, model.safetensors and tokenizer.json from huggingface.co/openai/clip-vit-large-patch14"
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
}


@dataclasses.dataclass(frozen=True)
class Tower:
    """The sizes of one of the transformers."""

    width: int
    hidden: int
    depth: int
    num_heads: int
    activation: str
    epsilon: float


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes of both, as config.json has them."""

    image: Tower
    text: Tower
    side: int  # of the images, in pixels
    patch: int
    vocabulary: int
    length: int  # of a text, in tokens
    end: int  # token whose first place the text is read at; 2, of old files: the largest token's
    shared: int  # channels of the common space


class Block(nnx.Module):
    """h += Attention(norm(h)); h += MLP(norm(h))."""

    def __init__(self, tower: Tower, *, dtype: Dtype, rngs: nnx.Rngs) -> None:
        width, options = tower.width, {"dtype": dtype, "rngs": rngs}
        self.num_heads, self.activation = tower.num_heads, tower.activation
        self.norm1, self.norm2 = (LayerNorm(width, epsilon=tower.epsilon) for _ in range(2))
        self.qkv, self.out = Linear(width, 3 * width, **options), Linear(width, width, **options)
        self.mlp_in, self.mlp_out = Linear(width, tower.hidden, **options), Linear(tower.hidden, width, **options)

    def __call__(self, h: jax.Array, causal: bool) -> jax.Array:
        """h [batch, tokens, width] → its shape."""
        q, k, v = self.qkv.to_heads(self.norm1(h), self.num_heads, 3)
        h = h + self.out.from_heads(jax.nn.dot_product_attention(q, k, v, is_causal=causal))
        return h + self.mlp_out(ACTIVATIONS[self.activation](self.mlp_in(self.norm2(h))))


class ImageTower(nnx.Module):
    """Images to the common space."""

    def __init__(self, sizes: Sizes, *, dtype: Dtype = jnp.float32, rngs: nnx.Rngs) -> None:
        tower, normal = sizes.image, initializers.normal(0.02)
        self.side, self.patch, self.dtype = sizes.side, sizes.patch, dtype
        self.patch_embed = Linear(3 * sizes.patch**2, tower.width, use_bias=False, dtype=dtype, rngs=rngs)
        self.class_token = nnx.Param(normal(rngs.params(), (tower.width,)))
        self.positions = nnx.Param(normal(rngs.params(), (1 + (sizes.side // sizes.patch) ** 2, tower.width)))
        self.norm_in, self.norm_out = (LayerNorm(tower.width, epsilon=tower.epsilon) for _ in range(2))
        self.blocks = stack(lambda rngs: Block(tower, dtype=dtype, rngs=rngs), tower.depth, rngs)
        self.project = Linear(tower.width, sizes.shared, use_bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """uint8 [batch, height, width, 3] → float32 [batch, shared]; the middle square is seen."""
        return self.features((square(images, self.side) - MEAN) / STD)

    def features(self, images: jax.Array) -> jax.Array:
        """Normalised images [batch, side, side, 3] → float32 [batch, shared]."""
        patches = patchify(images.astype(self.dtype), self.patch)
        h = self.patch_embed(patches.reshape(*patches.shape[:2], -1))
        first = jnp.broadcast_to(self.class_token[...].astype(self.dtype), (len(h), 1, h.shape[2]))
        h = self.norm_in(jnp.concatenate([first, h], axis=1) + self.positions[...].astype(self.dtype))
        h = run_stack(self.blocks, h, lambda block, h: block(h, False), dtype=self.dtype)
        return self.project(self.norm_out(h[:, 0])).astype(jnp.float32)


class TextTower(nnx.Module):
    """Texts to the common space."""

    def __init__(self, sizes: Sizes, *, dtype: Dtype = jnp.float32, rngs: nnx.Rngs) -> None:
        tower, normal = sizes.text, initializers.normal(0.02)
        self.end, self.dtype = sizes.end, dtype
        self.embedding = nnx.Param(normal(rngs.params(), (sizes.vocabulary, tower.width)))
        self.positions = nnx.Param(normal(rngs.params(), (sizes.length, tower.width)))
        self.blocks = stack(lambda rngs: Block(tower, dtype=dtype, rngs=rngs), tower.depth, rngs)
        self.norm_out = LayerNorm(tower.width, epsilon=tower.epsilon)
        self.project = Linear(tower.width, sizes.shared, use_bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Tokens int32 [batch, length], of which those after the end are never seen → float32 [batch, shared]."""
        h = (jnp.asarray(self.embedding[...])[tokens] + self.positions[...]).astype(self.dtype)
        h = self.norm_out(run_stack(self.blocks, h, lambda block, h: block(h, True), dtype=self.dtype))
        end = jnp.argmax(tokens if self.end == 2 else (tokens == self.end).astype(jnp.int32), axis=1)
        return self.project(h[jnp.arange(len(h)), end]).astype(jnp.float32)


def square(images: jax.Array, side: int) -> jax.Array:
    """Cut uint8 images [batch, height, width, 3] to their middle square in [0, 1], resized (bicubic, antialiased)."""
    _, height, width, _ = images.shape
    rows, columns = (length * side // min(height, width) for length in (height, width))
    x = images.astype(jnp.float32) / 255
    if (rows, columns) != (height, width):
        x = jax.image.resize(x, (len(x), rows, columns, 3), "cubic", antialias=True)
    top, left = (rows - side) // 2, (columns - side) // 2
    return jnp.clip(x[:, top : top + side, left : left + side], 0, 1)


# ---------------------------------------------------------------------------------------- files


def _blocks(tower: str, depth: int) -> list[Row]:
    block, many = f"{tower}.encoder.layers.{{i}}", {"count": depth}
    return [
        *norm_rows(f"{block}.layer_norm1", "blocks.norm1", **many),
        *joined_rows([f"{block}.self_attn.{part}_proj" for part in "qkv"], "blocks.qkv", **many),
        *linear_rows(f"{block}.self_attn.out_proj", "blocks.out", **many),
        *norm_rows(f"{block}.layer_norm2", "blocks.norm2", **many),
        *linear_rows(f"{block}.mlp.fc1", "blocks.mlp_in", **many),
        *linear_rows(f"{block}.mlp.fc2", "blocks.mlp_out", **many),
    ]


def image_table(sizes: Sizes) -> list[Row]:
    """Return the rows of the image tower in Hugging Face's layout."""
    return [
        Row("vision_model.embeddings.class_embedding", "class_token", VECTOR),
        Row("vision_model.embeddings.patch_embedding.weight", "patch_embed.kernel", convolution(sizes.patch)),
        Row("vision_model.embeddings.position_embedding.weight", "positions", MATRIX),
        *norm_rows("vision_model.pre_layrnorm", "norm_in"),
        *_blocks("vision_model", sizes.image.depth),
        *norm_rows("vision_model.post_layernorm", "norm_out"),
        Row("visual_projection.weight", "project.kernel", TRANSPOSE),
    ]


def text_table(sizes: Sizes) -> list[Row]:
    """Return the rows of the text tower in Hugging Face's layout."""
    return [
        Row("text_model.embeddings.token_embedding.weight", "embedding", MATRIX),
        Row("text_model.embeddings.position_embedding.weight", "positions", MATRIX),
        *_blocks("text_model", sizes.text.depth),
        *norm_rows("text_model.final_layer_norm", "norm_out"),
        Row("text_projection.weight", "project.kernel", TRANSPOSE),
    ]


def read_sizes(folder: pathlib.Path) -> Sizes:
    """Read the sizes from the folder's config.json; UserError if it is missing or not CLIP's."""
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{path}: no such file, and CLIP's sizes are in it; {WHERE}")
    try:
        config = json.loads(path.read_text())
        image, text = config["vision_config"], config["text_config"]
        sizes = Sizes(
            _tower(image),
            _tower(text),
            int(image.get("image_size", 224)),
            int(image.get("patch_size", 32)),
            int(text.get("vocab_size", 49408)),
            int(text.get("max_position_embeddings", 77)),
            int(text.get("eos_token_id", 49407)),
            int(config.get("projection_dim", 512)),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: no readable configuration of CLIP ({error!r}); {WHERE}") from error
    for tower in (sizes.image, sizes.text):
        if tower.activation not in ACTIVATIONS:
            raise UserError(f"{path}: the activation {tower.activation!r} is not one of {', '.join(ACTIVATIONS)}")
    return sizes


def _tower(config: Mapping[str, Any]) -> Tower:
    return Tower(
        int(config["hidden_size"]),
        int(config["intermediate_size"]),
        int(config.get("num_hidden_layers", 12)),
        int(config["num_attention_heads"]),
        str(config.get("hidden_act", "quick_gelu")),
        float(config.get("layer_norm_eps", 1e-5)),
    )


def load(folder: pathlib.Path) -> tuple[Sizes, dict[str, Any], dict[str, Any]]:
    """Read sizes, and the parameters of `ImageTower` and `TextTower` in float32.

    Raises:
        UserError: a file is missing (with where to get it), damaged, or of another model.
    """
    sizes, tensors = read_sizes(folder), read_safetensors(folder)

    def tower(prefixes: tuple[str, ...], table: list[Row], kind: type[ImageTower] | type[TextTower]) -> dict[str, Any]:
        mine = {name: tensors[name] for name in tensors if name.startswith(prefixes)}
        # Tables of numbers 0, 1, 2, … that older files hold.
        fixed = tuple(name for name in mine if name.endswith("position_ids"))
        like = functional(lambda rngs: kind(sizes, rngs=rngs)).shapes
        return to_ours(table, mine, like=like, dtype=lambda path: np.float32, ignore=fixed, what=str(folder))

    image = tower(("vision_model.", "visual_projection."), image_table(sizes), ImageTower)
    return sizes, image, tower(("text_model.", "text_projection."), text_table(sizes), TextTower)


def tokenizer(folder: pathlib.Path, length: int) -> Callable[[list[str]], np.ndarray]:
    """Return the function from texts to tokens int32 [texts, length], cut and filled up.

    Raises:
        UserError: the package or the file is missing, or it is no tokenizer.
    """
    try:
        import tokenizers
    except ImportError as error:
        raise UserError("reading texts for CLIP needs tokenizers; run: pip install tokenizers") from error
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"{path}: no such file, and CLIP's tokenizer is in it; {WHERE}")
    try:
        made = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises plain Exceptions
        raise UserError(f"{path}: no readable tokenizer ({reason(error)}); {WHERE}") from error
    made.enable_truncation(length)
    made.no_padding()

    def encode(texts: list[str]) -> np.ndarray:
        tokens = np.zeros((len(texts), length), np.int32)
        for row, encoding in zip(tokens, made.encode_batch(texts), strict=True):
            row[: len(encoding.ids)] = encoding.ids
        return tokens

    return encode
