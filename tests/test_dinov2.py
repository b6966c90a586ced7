"""models/dinov2.py against the public PyTorch implementation's numbers."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deco_jax.convert.mapping import flatten, to_torch
from deco_jax.convert.torch_files import write_safetensors
from deco_jax.errors import UserError
from deco_jax.models import dinov2
from deco_jax.run.sharding import compiling_for
from tests.helpers import golden, golden_params, nhwc, relative_error

pytestmark = pytest.mark.fast

SMALL = {"width": 24, "depth": 3}


def build(params: dict, dtype=jnp.float32) -> dinov2.DINOv2:
    graphdef, state = nnx.split(nnx.eval_shape(lambda: dinov2.DINOv2(24, 3, 2, dtype=dtype, rngs=nnx.Rngs(0))))
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graphdef, state)


@functools.partial(jax.jit, static_argnums=2)
def run(model: dinov2.DINOv2, images: jax.Array, patch_size: int = 16) -> jax.Array:
    return model(images, patch_size).tokens


def in_huggingface_layout(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Renamed by hand, independently of the table."""
    renamed = {}
    for key, a in tensors.items():
        head, _, rest = key.partition(".")
        if head == "blocks":
            i, _, rest = rest.partition(".")
            block = f"encoder.layer.{i}."
            if rest.startswith("attn.qkv"):
                suffix = rest.rpartition(".")[2]
                for name, part in zip(("query", "key", "value"), np.split(a, 3), strict=True):
                    renamed[f"{block}attention.attention.{name}.{suffix}"] = part
                continue
            for old, new in (
                ("attn.proj", "attention.output.dense"),
                ("ls1.gamma", "layer_scale1.lambda1"),
                ("ls2.gamma", "layer_scale2.lambda1"),
            ):
                rest = rest.replace(old, new)
            renamed[block + rest] = a
        elif head == "norm":
            renamed[f"layernorm.{rest}"] = a
        elif head == "patch_embed":
            renamed[f"embeddings.patch_embeddings.projection.{rest.removeprefix('proj.')}"] = a
        else:
            renamed["embeddings." + {"pos_embed": "position_embeddings"}.get(head, head)] = a
    return renamed


@pytest.mark.parametrize("size", [64, 96])
def test_golden(size):
    values = golden("dinov2")
    images = jnp.asarray(nhwc(values[f"image{size}"]))
    assert relative_error(dinov2.preprocess(images), nhwc(values[f"resized{size}"])) < 1e-5
    model = build(dinov2.from_torch(golden_params("dinov2"), **SMALL))
    for platform in ("cpu", "tpu"):
        with compiling_for(platform):
            features = jax.jit(lambda images: model(images).tokens)(images)
        assert relative_error(features, values[f"features{size}"]) < 1e-5, platform


def test_uint8_is_the_unit_interval_and_patch_sizes_keep_the_tokens():
    model = build(dinov2.from_torch(golden_params("dinov2"), **SMALL))
    images = np.random.default_rng(0).integers(0, 256, (2, 16, 24, 3), np.uint8)
    features = run(model, jnp.asarray(images), 8)
    assert features.shape == (2, 6, 24)
    assert features.dtype == jnp.float32
    assert relative_error(features, run(model, jnp.asarray(images / 255, jnp.float32), 8)) < 1e-6
    with pytest.raises(UserError, match="16×24 images don't divide into patches of 16"):
        dinov2.preprocess(jnp.asarray(images), 16)


def test_bfloat16_stays_close():
    params = dinov2.from_torch(golden_params("dinov2"), **SMALL, dtype=jnp.bfloat16)
    assert {str(a.dtype) for path, a in flatten(params).items() if path.endswith("kernel")} == {"bfloat16"}
    assert params["norm"]["scale"].dtype == params["positions"].dtype == np.float32
    values = golden("dinov2")
    features = run(build(params, jnp.bfloat16), jnp.asarray(nhwc(values["image64"])))
    assert 1e-4 < relative_error(features, values["features64"]) < 5e-2


def test_the_trained_grid_is_not_resized():
    table = jnp.asarray(golden_params("dinov2")["pos_embed"][0, 1:])
    np.testing.assert_array_equal(dinov2.resize_positions(table, 37, 37), table)
    assert dinov2.resize_positions(table, 16, 24).shape == (16 * 24, 24)


def test_both_layouts_give_the_same_parameters_and_round_trip():
    tensors = golden_params("dinov2")
    meta = dinov2.from_torch(tensors, **SMALL)
    theirs = in_huggingface_layout(tensors)
    huggingface = dinov2.from_torch(theirs, **SMALL)
    assert flatten(meta).keys() == flatten(huggingface).keys()
    for path, a in flatten(meta).items():
        np.testing.assert_array_equal(a, flatten(huggingface)[path], err_msg=path)
    for layout, source in ((dinov2.META_LAYOUT, tensors), (dinov2.HF_LAYOUT, theirs)):
        back = to_torch(dinov2.table(3, layout), meta)
        assert back.keys() == source.keys() - set(dinov2.IGNORED)
        for name in back:
            np.testing.assert_array_equal(back[name], source[name], err_msg=name)


@pytest.mark.parametrize("size, count", [("S", 22_056_192), ("B", 86_579_712), ("L", 304_367_616)])
def test_parameter_counts(size, count):
    """Meta's files hold these many numbers besides the mask token (width)."""
    model = nnx.eval_shape(lambda: dinov2.DINOv2.of_size(size, rngs=nnx.Rngs(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))) == count


def test_loading(tmp_path, monkeypatch):
    monkeypatch.setitem(dinov2.SIZES, "B", (24, 3, 2))
    tensors = golden_params("dinov2")
    expected = flatten(dinov2.from_torch(tensors, **SMALL))
    write_safetensors(tmp_path / "model.safetensors", in_huggingface_layout(tensors))
    paths = [tmp_path, tmp_path / "model.safetensors"]
    try:
        import torch
    except ImportError:
        pass
    else:
        torch.save({key: torch.from_numpy(a.copy()) for key, a in tensors.items()}, tmp_path / "meta.pth")
        paths.append(tmp_path / "meta.pth")
    for path in paths:
        loaded = flatten(dinov2.load_teacher(path, "B"))
        assert all(np.array_equal(loaded[name], a) for name, a in expected.items())
    with pytest.raises(UserError, match=r"position_embeddings.*\[1, 1370, 384\]"):
        dinov2.load_teacher(tmp_path, "S")


def test_what_is_missing_is_said_with_where_to_get_it(tmp_path):
    with pytest.raises(UserError, match=r"dinov2_vitb14_pretrain\.pth or huggingface\.co/facebook/dinov2-base"):
        dinov2.load_teacher(tmp_path / "none.pth", "B")
    with pytest.raises(UserError, match=r"no path .*dinov2_vitl14_pretrain\.pth"):
        dinov2.load_teacher(None, "L")
    with pytest.raises(UserError, match="unknown DINOv2 size 'XL'; use one of S, B, L"):
        dinov2.load_teacher(None, "XL")
    tensors = golden_params("dinov2")
    with pytest.raises(UserError, match=r"tensors left over: 14 \(blocks\.2"):
        dinov2.from_torch(tensors, width=24, depth=2)
