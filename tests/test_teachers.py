"""Teachers against transformers, with small random weights that go through the files that people have."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
from flax import nnx

from deco_jax.convert.mapping import flatten, to_torch
from deco_jax.convert.torch_files import read_tensors
from deco_jax.errors import UserError
from deco_jax.models import dinov2, dinov3, siglip2, teachers, vit
from deco_jax.models.network import functional
from deco_jax.resize import resize_bicubic
from deco_jax.run import sharding
from tests.helpers import relative_error

RANDOM = np.random.default_rng(0)
BOUND = 1e-4


@pytest.fixture(scope="module")
def transformers():
    """The library, and PyTorch."""
    pytest.importorskip("torch", reason="transformers needs PyTorch: pip install torch")
    return pytest.importorskip("transformers", reason="the reference is transformers: pip install transformers")


def saved(model, folder):
    """A model with random weights everywhere, and its file."""
    import torch

    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    model.eval().save_pretrained(folder)
    return model


def seen(model, images, **options):
    """Its output on normalised images [batch, height, width, 3]: tokens, and what stands for the image."""
    import torch

    with torch.no_grad():
        out = model(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()), **options)
    return out.last_hidden_state.numpy(), out.pooler_output.numpy()


def run(module, params, images, patch_size):
    """A teacher's view of uint8 images."""
    network = functional(module)
    assert jax.tree.map(np.shape, params) == jax.tree.map(lambda leaf: leaf.shape, network.shapes)
    return jax.jit(functools.partial(network.apply, patch_size=patch_size))(params, images)


def pixels(*shape: int) -> np.ndarray:
    return RANDOM.integers(0, 256, (*shape, 3), dtype=np.uint8)


def normalised(images, mean=vit.MEAN, std=vit.STD):
    return ((images / 255 - mean) / std).astype(np.float32)


@pytest.mark.parametrize("registers, gated", [(0, True), (4, False), (4, True)])
def test_dinov2(transformers, tmp_path, monkeypatch, registers, gated):
    """Size g's MLP, and registers, whose table of positions is resized otherwise."""
    size = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "use_swiglu_ffn": gated}
    options = {"image_size": 518, "patch_size": 14, "layer_norm_eps": 1e-6, **size}
    if registers:
        config = transformers.Dinov2WithRegistersConfig(num_register_tokens=registers, **options)
        model = saved(transformers.Dinov2WithRegistersModel(config), tmp_path)
    else:
        model = saved(transformers.Dinov2Model(transformers.Dinov2Config(**options)), tmp_path)
    style = vit.BlockStyle(mlp_hidden=64, gated=True) if gated else vit.PLAIN
    monkeypatch.setitem(dinov2.SIZES, "S", (24, 2, 2))
    monkeypatch.setitem(dinov2.STYLES, "S", style)
    params = dinov2.load_teacher(tmp_path, "S", registers=registers)
    # Without registers the grid is the trained one: there Hugging Face's interpolation is not Meta's.
    sides = (64, 96) if registers else (592, 592)
    images = pixels(2 if registers else 1, *sides)
    tokens, image = seen(model, np.asarray(dinov2.preprocess(images)))
    view = run(lambda rngs: dinov2.DINOv2.of_size("S", registers=registers, rngs=rngs), params, images, 16)
    assert relative_error(view.tokens, tokens[:, 1 + registers :]) < BOUND
    assert relative_error(view.image, image) < BOUND
    # Meta's layout has the same numbers under other names.
    meta = to_torch(dinov2.table(2, registers=registers, gated=gated), params)
    again = dinov2.from_torch(meta, width=24, depth=2, registers=registers, gated=gated)
    assert all(np.array_equal(flatten(again)[name], array) for name, array in flatten(params).items())


@pytest.mark.parametrize("gated, qkv_bias", [(0, True), (40, True), (40, False)])
def test_dinov3(transformers, tmp_path, monkeypatch, gated, qkv_bias):
    size = dinov3.Size(32, 2, 2, gated, "vits16", qkv_bias)
    config = transformers.DINOv3ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=gated or 128,
        use_gated_mlp=gated > 0, hidden_act="silu" if gated else "gelu", num_register_tokens=4,
        query_bias=qkv_bias, value_bias=qkv_bias,
    )  # fmt: skip
    model = saved(transformers.DINOv3ViTModel(config), tmp_path)
    monkeypatch.setitem(dinov3.SIZES, "S", size)
    params = dinov3.load(tmp_path, "S")
    if not qkv_bias:
        assert "bias" not in params["blocks"]["attention"]["qkv"]
    images = pixels(2, 64, 96)
    tokens, image = seen(model, normalised(images))
    view = run(lambda rngs: dinov3.DINOv3(size, rngs=rngs), params, images, 16)
    assert relative_error(view.tokens, tokens[:, 5:]) < BOUND
    assert relative_error(view.image, image) < BOUND


def test_siglip2(transformers, tmp_path, monkeypatch):
    """On the trained grid and on another one; from a file that holds the text model too, or not."""
    size = siglip2.Size(24, 2, 2, 40, "base")
    vision = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40}
    text = {**vision, "vocab_size": 10, "projection_size": 24}
    config = transformers.SiglipConfig(vision_config={**vision, "image_size": 256, "patch_size": 16}, text_config=text)
    model = saved(transformers.SiglipModel(config), tmp_path)
    monkeypatch.setitem(siglip2.SIZES, "B", size)
    params = siglip2.load(tmp_path, "B")
    make = functools.partial(siglip2.SigLIP2, size)
    for sides, options in (((256, 256), {}), ((64, 96), {"interpolate_pos_encoding": True})):
        images = pixels(1, *sides)
        tokens, image = seen(model.vision_model, normalised(images, 0.5, 0.5), **options)
        view = run(lambda rngs: make(rngs=rngs), params, images, 16)
        assert relative_error(view.tokens, tokens) < BOUND
        assert relative_error(view.image, image) < BOUND
    model.vision_model.save_pretrained(tmp_path / "vision")
    alone = flatten(siglip2.load(tmp_path / "vision", "B"))
    assert all(np.array_equal(alone[name], array) for name, array in flatten(params).items())
    file = dict(read_tensors(tmp_path))
    file["vision_model.embeddings.position_embedding.weight"] = np.zeros((196, 24), np.float32)
    with pytest.raises(UserError, match=r"position_embedding.*\[196, 24\], expected \[256, 24\]; take the file of"):
        siglip2.from_torch(file, size)


@pytest.mark.parametrize(
    "name, size, millions",
    [
        ("dinov2", "g", 1136),
        ("dinov2_reg", "B", 86.6),
        ("dinov3", "S", 21.6),
        ("dinov3", "S+", 28.7),
        ("dinov3", "B", 85.7),
        ("dinov3", "L", 303),
        ("dinov3", "H+", 841),
        ("dinov3", "7B", 6716),
        ("siglip2", "B", 92.9),
        ("siglip2", "So400m", 428),
    ],
)
def test_published_parameter_counts(name, size, millions):
    """As their authors round them; a mask token is not in ours."""
    shapes = teachers.TEACHERS[name].make(size, "", "bfloat16", 16).shapes
    counted = sum(leaf.size for leaf in jax.tree.leaves(shapes)) / 1e6
    assert counted == pytest.approx(millions, rel=3e-3)


@pytest.mark.parametrize("name", teachers.TEACHERS)
def test_every_teacher(name):
    """A sharding rule for each parameter, matrices split; where its weights are; FLOPs by the sizes of its matrices."""
    kind = teachers.TEACHERS[name]
    size = kind.sizes[0]
    network = kind.make(size, "", "bfloat16", 16)
    mesh = jax.sharding.AbstractMesh((1, 4), ("data", "fsdp"))
    placed = sharding.state_shardings(mesh, {"teacher": network.shapes})
    for path, leaf in jax.tree.leaves_with_path(placed):
        matrix = path[-1].key in ("kernel", "positions")
        assert ("fsdp" in leaf.spec) == matrix, path
    kernels = {str(leaf.dtype) for path, leaf in jax.tree.leaves_with_path(network.shapes) if path[-1].key == "kernel"}
    assert kernels == {"bfloat16"}
    with pytest.raises(UserError, match=r"(download|accept).*(https://|huggingface\.co)"):
        network.load()
    if name == "vgg":
        return
    blocks = network.shapes["blocks"]
    matrices = sum(leaf.size for path, leaf in jax.tree.leaves_with_path(blocks) if path[-1].key == "kernel")
    tokens = 256 + {"dinov2": 1, "siglip2": 0}.get(name, 5)
    width, depth = kind.width(size), len(blocks["norm1"]["scale"])
    patches = 256 * 3 * {"dinov3": 16, "siglip2": 16}.get(name, 14) ** 2 * width
    assert network.flops(256, 256) == 2 * (matrices * tokens + depth * 2 * tokens**2 * width + patches)


@pytest.mark.parametrize("name", ["dinov3", "siglip2"])
def test_other_patches_have_the_same_tokens(name, monkeypatch):
    """Patches of 8 see the image twice as large."""
    module = dinov3 if name == "dinov3" else siglip2
    size = dinov3.Size(32, 1, 2, 0, "") if name == "dinov3" else siglip2.Size(32, 1, 2, 40, "")
    make = functools.partial(dinov3.DINOv3 if name == "dinov3" else siglip2.SigLIP2, size)
    model = make(rngs=nnx.Rngs(0))
    images = pixels(1, 16, 24)
    view = jax.jit(lambda images: model(images, 8))(images)
    assert view.tokens.shape == (1, 6, 32)
    mean, std = (vit.MEAN, vit.STD) if module is dinov3 else (0.5, 0.5)
    large = resize_bicubic(normalised(images, mean, std), 32, 48)
    assert relative_error(view.tokens, jax.jit(model.features)(large).tokens) < 1e-5
