"""A text encoder's folder as Hugging Face lays it out, small and of random weights; captions that are hard to cut."""

from __future__ import annotations

import json
import pathlib

import jax
import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from deco_jax.convert.mapping import to_torch
from deco_jax.convert.torch_files import write_safetensors
from deco_jax.models import qwen3
from deco_jax.models.qwen3 import Sizes

SIZES = Sizes(vocabulary=261, width=32, mlp_hidden=48, depth=2, num_heads=4, num_kv_heads=2, head_width=8)
MERGES = [("c", "a"), ("Ġ", "ca"), ("Ġca", "t"), ("t", "h")]


def write_tokenizer(path: pathlib.Path) -> None:
    """Of Qwen3's kind: NFC, byte-level pieces, some of them merged, and the padding token."""
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet()) + ["".join(merge) for merge in MERGES]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, MERGES))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(path))


def write_encoder(folder: pathlib.Path, seed: int = 0) -> pathlib.Path:
    """config.json, tokenizer.json and model.safetensors of a Qwen3 of SIZES."""
    folder.mkdir(parents=True, exist_ok=True)
    s = SIZES
    config = {
        "model_type": "qwen3",
        "vocab_size": s.vocabulary,
        "hidden_size": s.width,
        "intermediate_size": s.mlp_hidden,
        "num_hidden_layers": s.depth,
        "num_attention_heads": s.num_heads,
        "num_key_value_heads": s.num_kv_heads,
        "head_dim": s.head_width,
        "rope_theta": s.rope_theta,
        "rms_norm_eps": s.norm_epsilon,
    }
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder / "tokenizer.json")
    draw = np.random.default_rng(seed)
    params = jax.tree.map(lambda leaf: draw.normal(0, 0.2, leaf.shape).astype(np.float32), qwen3.shapes(s))
    tensors = to_torch(qwen3.table(s.depth), params)
    write_safetensors(folder / "model.safetensors", {f"model.{name}": a for name, a in tensors.items()})
    return folder


def hard_captions() -> list[str]:
    """A hundred: scripts, emoji, composed and decomposed letters, control characters, nothing, far too much."""
    some = [
        "",
        " ",
        "a cat",
        "A  CAT\n\n on\ta mat. ",
        "naïve café",
        "nai\u0308ve cafe\u0301",
        "日本の庭園に咲く桜",
        "красная лиса в снегу",
        "ثعلب أحمر في الثلج",
        "שועל אדום",
        "สุนัขจิ้งจอกสีแดง",
        "हिन्दी में एक वाक्य",
        "한국어 문장",
        "👩\u200d👩\u200d👧\u200d👦 family",
        "🏳\ufe0f\u200d🌈🦊❄\ufe0f",
        "½ ﬁne ℌ 𝔘𝔫𝔦",
        "\u200b\u202e\ufeff",
        "a\x00b",
        "<|endoftext|> inside",
        "<|im_start|>user\nhi<|im_end|>",
        "1234567890 3.14159",
        "it's we'll I'VE",
        "…—“”‘’",
        "C:\\path\\file.txt https://a.b/c?d=e&f=%20",
        "😀" * 300,
        "word " * 1000,
        "x" * 5000,
    ]
    draw, letters = np.random.default_rng(0), "".join(some)
    while len(some) < 100:
        some.append("".join(draw.choice(list(letters), size=draw.integers(1, 200))))
    return some
