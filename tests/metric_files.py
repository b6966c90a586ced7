"""Weights for the metrics, tiny or random, in the layouts that users have."""

from __future__ import annotations

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from deco_jax.convert.mapping import to_torch
from deco_jax.convert.torch_files import write_safetensors
from deco_jax.models import clip, dinov2
from deco_jax.models.network import functional

END = 99  # of a text


def write_tokenizer(folder):
    """Words to numbers, between a beginning and an end as CLIP's has them."""
    import tokenizers

    words = {"a": 3, "photo": 4, "of": 5, "zero": 6, "one": 7, "fox": 8, "[start]": 1, "[end]": END, "[unknown]": 2}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[unknown]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="[start] $A [end]", special_tokens=[("[start]", 1), ("[end]", END)]
    )
    made.save(str(folder / "tokenizer.json"))


def random_params(make, seed: int = 0, scale: float = 0.05):
    """Parameters of a module, scales around 1."""
    rng = np.random.default_rng(seed)

    def weights(path, leaf):
        return np.asarray((path[-1].key == "scale") + scale * rng.standard_normal(leaf.shape), np.float32)

    return jax.tree_util.tree_map_with_path(weights, functional(make).shapes)


def write_clip(folder: pathlib.Path) -> pathlib.Path:
    """A tiny CLIP's folder."""
    folder.mkdir()
    tower = {"intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "hidden_act": "quick_gelu"}
    text = {**tower, "hidden_size": 16, "vocab_size": 100, "max_position_embeddings": 12, "eos_token_id": END}
    image = {**tower, "hidden_size": 16, "image_size": 16, "patch_size": 8}
    config = {"text_config": text, "vision_config": image, "projection_dim": 8}
    (folder / "config.json").write_text(json.dumps(config))
    sizes = clip.read_sizes(folder)
    tensors = to_torch(clip.image_table(sizes), random_params(lambda rngs: clip.ImageTower(sizes, rngs=rngs), 1))
    tensors |= to_torch(clip.text_table(sizes), random_params(lambda rngs: clip.TextTower(sizes, rngs=rngs), 2))
    write_safetensors(folder / "model.safetensors", tensors)
    write_tokenizer(folder)
    return folder


def write_dinov2(path: pathlib.Path) -> pathlib.Path:
    """DINOv2 ViT-S/14 with random weights, in Meta's layout: 88 MB."""
    params = random_params(lambda rngs: dinov2.DINOv2.of_size("S", dtype=jnp.float32, rngs=rngs), 3)
    write_safetensors(path, to_torch(dinov2.table(12), params))
    return path
