"""The ways to align: targets, projectors, hidden tokens, weights that change; against NumPy in float64."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
import scipy.special

from configs import cifar10, irepa256
from deco_jax import config as config_lib
from deco_jax import flops
from deco_jax.errors import UserError
from deco_jax.method import training
from deco_jax.method.losses import repa
from deco_jax.method.objective import make_method
from deco_jax.method.optimizer import make_optimizer
from deco_jax.method.step import Observed
from deco_jax.models import network as network_lib
from deco_jax.models import teachers, vgg
from deco_jax.models.jit import wave_positions
from deco_jax.models.network import FrozenNetwork, View
from deco_jax.models.projector import make_projector
from deco_jax.run import sharding
from deco_jax.run.state import initial_state
from tests.helpers import lpips_params, relative_error

RANDOM = np.random.default_rng(0)


def numbers(*shape: int, scale: float = 1.0) -> np.ndarray:
    return (scale * RANDOM.normal(size=shape)).astype(np.float32)


def test_irepa_s_target():
    features = numbers(2, 12, 5) + 3
    x = features.astype(np.float64)
    mean = x.mean(axis=1, keepdims=True)
    deviation = np.sqrt(((x - mean) ** 2).sum(axis=1, keepdims=True) / 11)
    assert relative_error(repa.spatial_target(features), (x - 0.8 * mean) / (deviation + 1e-6)) < 1e-5


def projector(kind: str, **options):
    """For tokens of 8 channels, features of 6; with weights away from their start."""
    network = make_projector(ml_collections.ConfigDict({"width": 8, "dtype": "float32"}), 6, kind, **options)
    return network, jax.tree.map(lambda leaf: numbers(*leaf.shape, scale=0.5), network.shapes)


def test_a_convolution_as_the_projector():
    """By its definition, zeros around the grid."""
    network, params = projector("conv")
    hidden = numbers(2, 12, 8)
    padded = np.pad(hidden.astype(np.float64).reshape(2, 3, 4, 8), ((0, 0), (1, 1), (1, 1), (0, 0)))
    kernel = params["convolution"]["kernel"].astype(np.float64)
    expected = np.zeros((2, 3, 4, 6)) + params["convolution"]["bias"]
    for y in range(3):
        for x in range(4):
            expected[:, y, x] += np.einsum("bijc,ijcd->bd", padded[:, y : y + 3, x : x + 3], kernel)
    assert relative_error(network.apply(params, hidden, (3, 4)), expected.reshape(2, 12, 6)) < 1e-5


def transformer_by_hand(params, hidden):
    """One head (the width is below 64), in float64."""

    def norm(x, p):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]

    def linear(x, p):
        return x @ p["kernel"] + p["bias"]

    h = hidden.astype(np.float64) + wave_positions(3, 4, 8)
    for i in range(2):
        block = jax.tree.map(lambda leaf, i=i: leaf[i].astype(np.float64), params["blocks"])
        q, k, v = np.split(linear(norm(h, block["norm1"]), block["attention"]["qkv"]), 3, axis=-1)
        h = h + linear(scipy.special.softmax(q @ k.swapaxes(1, 2) / np.sqrt(8), -1) @ v, block["attention"]["out"])
        inner = linear(norm(h, block["norm2"]), block["mlp_in"])
        h = h + linear(inner * scipy.special.ndtr(inner), block["mlp_out"])
    return linear(norm(h, params["norm"]), params["head"])


def test_a_transformer_as_the_projector():
    network, params = projector("transformer")
    hidden = numbers(2, 12, 8)
    assert relative_error(network.apply(params, hidden, (3, 4)), transformer_by_hand(params, hidden)) < 1e-5


def test_hidden_tokens_are_the_same_for_a_key_and_as_many_in_each():
    keys = jax.random.split(jax.random.key(0), 5)
    mask = np.asarray(repa.hidden_tokens(keys, 64, 0.2))
    assert mask.sum(axis=1).tolist() == [13] * 5
    assert len({row.tobytes() for row in mask}) == 5
    np.testing.assert_array_equal(repa.hidden_tokens(keys[3:], 64, 0.2), mask[3:])


def test_the_projector_does_not_see_hidden_tokens():
    network, params = projector("transformer", masked=True)
    hidden, mask = numbers(2, 12, 8), np.asarray(repa.hidden_tokens(jax.random.split(jax.random.key(0), 2), 12, 0.25))
    seen = np.where(mask[..., None], params["mask_token"], hidden)
    expected = transformer_by_hand({k: v for k, v in params.items() if k != "mask_token"}, seen)
    assert relative_error(network.apply(params, hidden, (3, 4), mask), expected) < 1e-5


# ------------------------------------------------------------------------------------------------ VGG16


@pytest.mark.parametrize("tap, patch, sides", [("3", 4, (32, 32)), ("2", 8, (16, 32)), ("1", 2, (8, 4))])
def test_vgg_s_tap_as_a_teacher(tap, patch, sides):
    """By PyTorch's convolutions; a vector for each of the student's tokens."""
    torch = pytest.importorskip("torch", reason="the reference is PyTorch: pip install torch")
    pixels = RANDOM.integers(0, 256, (2, *sides, 3), np.uint8)
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    stride = 2 ** (int(tap) - 1)
    if stride != patch:
        size = [side * stride // patch for side in sides]
        x = torch.nn.functional.interpolate(x, size=size, mode="bilinear", antialias=True)
    x = (x - torch.tensor(vgg.SHIFT)[:, None, None]) / torch.tensor(vgg.SCALE)[:, None, None]
    params, number = lpips_params()["convolutions"], 0
    for group, widths in enumerate(vgg.GROUPS[: int(tap)]):
        x = torch.nn.functional.max_pool2d(x, 2) if group else x
        for _ in widths:
            kernel = torch.from_numpy(params[number]["kernel"].transpose(3, 2, 0, 1))
            x = torch.relu(torch.nn.functional.conv2d(x, kernel, padding=1))
            number += 1
    teacher = vgg.teacher(tap, "", "float32", patch)
    weights = {"convolutions": {i: params[i] for i in range(number)}}
    assert jax.tree.map(np.shape, weights) == jax.tree.map(lambda leaf: leaf.shape, teacher.shapes)
    view = jax.jit(teacher.apply)(weights, pixels)
    tokens = x.permute(0, 2, 3, 1).reshape(2, -1, x.shape[1]).numpy()
    assert tokens.shape[1] == sides[0] * sides[1] // patch**2
    assert relative_error(view.tokens, tokens) < 1e-5
    image = tokens.mean(1, dtype=np.float64)
    image -= image.mean(1, keepdims=True)
    assert relative_error(view.image, image / np.sqrt((image**2).mean(1, keepdims=True) + 1e-6)) < 1e-4
    assert relative_error(jax.jit(teacher.apply)(weights, pixels / np.float32(255)).tokens, tokens) < 1e-5


def test_vgg_loads_what_it_needs_and_says_where_it_is(tmp_path):
    with pytest.raises(UserError, match=r"no path: no VGG16's weights there; download https://download\.pytorch\.org"):
        vgg.teacher("3", "", "float32", 4).load()
    with pytest.raises(UserError, match="no VGG16's weights there"):
        vgg.teacher("3", str(tmp_path / "vgg16.pth"), "float32", 4).load()


def test_a_size_that_a_teacher_has_not():
    config = cifar10.get_config("deco_repa")
    config.teacher.size = "B"
    with pytest.raises(UserError, match=r"config.teacher.size='B' is not a size of vgg; choose one of 1, 2, 3, 4, 5"):
        config_lib.check(config)
    with pytest.raises(UserError, match="is not a teacher; choose one of dinov2"):
        teachers.features_width("clip", "B")


def test_an_image_that_the_teacher_can_not_read():
    config = cifar10.get_config("deco_repa")
    config.teacher.size, config.model.patch_size, config.data.image_size = "1", 3, (33, 36)
    config_lib.check(config)
    config.teacher.name, config.teacher.size, config.model.patch_size = "dinov2", "S", 33
    config.data.image_size = (33, 33)
    config_lib.check(config)
    config.teacher.name, config.teacher.size, config.model.patch_size = "vgg", "2", 3
    config.data.image_size = (33, 36)
    config_lib.check(config)


# ------------------------------------------------------------------------------------------------ on the way


def test_settings_that_need_another():
    config = irepa256.get_config("deco")
    config.loss.repa_schedule = "cosine"
    with pytest.raises(UserError, match=r"falls to 0 at config.loss.repa_until_step, which is 0"):
        config_lib.check(config)
    config.loss.repa_until_step = 100
    config_lib.check(config)
    config.model.patch_size = 256
    with pytest.raises(UserError, match="this image is one token"):
        config_lib.check(config)


def view(params, images):
    """Stands in for a teacher: a product with the pixels of each of an image's four quarters, as they lie in memory."""
    tokens = jnp.asarray(images, jnp.float32).reshape(len(images), 4, -1) @ params["null"]
    return View(tokens, tokens[:, 0])


TEACHER = FrozenNetwork(view, {"null": jax.ShapeDtypeStruct((48, 6), jnp.float32)}, dict, lambda height, width: 0.0)


@pytest.fixture(scope="module")
def small():
    """A tiny run's config, its networks and state, with an alignment that ends after 3 steps, its weight falling."""
    config = cifar10.get_config("dit_repa-smoke")
    config.model.width, config.model.depth, config.loss.repa_layer = 16, 2, 1
    config.data.image_size = (8, 8)
    config.loss.repa_until_step, config.loss.repa_schedule = 3, "linear"
    return config


def with_teacher(monkeypatch):
    monkeypatch.setattr(repa, "make_teacher", lambda config: teachers.Teacher(TEACHER, 6))
    monkeypatch.setattr(repa, "features_width", lambda name, size: 6)


@pytest.mark.parametrize("schedule, share", [("linear", 2 / 3), ("cosine", (1 + np.cos(np.pi / 3)) / 2)])
def test_the_weight_falls_and_ends(small, schedule, share, monkeypatch):
    with_teacher(monkeypatch)
    small.loss.repa_schedule = schedule
    method = make_method(small)
    assert method.ends == [3]
    assert [loss.name for loss in method.at(2).losses] == ["pixel", "alignment"]
    assert [loss.name for loss in method.at(3).losses] == ["pixel"]
    assert method.at(3).layer is None
    assert method.at(3).features == ()
    networks = {"denoiser": network_lib.build(small.model.to_dict())} | method.trained
    params = {name: network.init(jax.random.key(1)) for name, network in networks.items()}
    frozen = {"teacher": {"null": numbers(48, 6)}}
    pixels = RANDOM.integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    observed = Observed(jnp.arange(4), jnp.int32(10), method.observe(frozen, pixels))
    draws = method.draw(jax.random.key(0), pixels.shape, jnp.int32(1))
    objective = jax.jit(functools.partial(method.objective, networks=networks))
    loss, terms = objective(params, pixels, draws, observed, frozen)
    np.testing.assert_allclose(loss, terms["pixel"] + 0.5 * share * terms["alignment"], rtol=1e-6)
    whole, _ = objective(params, pixels, draws._replace(shares={}), observed, frozen)
    np.testing.assert_allclose(whole, terms["pixel"] + 0.5 * terms["alignment"], rtol=1e-6)


def test_after_its_end_the_step_has_no_teacher(small, monkeypatch):
    """Neither its weights nor its product are in the program; what trains is what trains without an alignment."""
    with_teacher(monkeypatch)
    small.loss.repa_schedule = "constant"
    networks, observe, _ = training.abstract_networks(small, sharding.make_mesh(1, 1))
    optimizer = make_optimizer(small.optimizer)
    state = initial_state(jax.random.key(0), networks, optimizer)
    frozen = {"teacher": {"null": numbers(48, 6)}}
    batch = {"image": RANDOM.integers(0, 256, (4, 8, 8, 3), dtype=np.uint8), "label": np.arange(4, dtype=np.int32)}
    texts, after = [], None
    for start in (0, 3):
        step = jax.jit(training.make_train_step(networks, optimizer, small, observe, start=start))
        lowered = step.lower(state, batch, frozen)
        texts.append(lowered.as_text())
        after = step(state, batch, frozen)
    assert "tensor<48x6xf32>" in texts[0]
    assert "48x6" not in texts[1]
    new, metrics = after
    assert "alignment" not in metrics

    without = small.copy_and_resolve_references()
    without.loss.repa_weight = 0.0
    plain, observe, _ = training.abstract_networks(without, sharding.make_mesh(1, 1))
    start = {**state, "params": {"denoiser": state["params"]["denoiser"]}}
    start["opt_state"] = optimizer.init(start["params"])
    expected, _ = jax.jit(training.make_train_step(plain, optimizer, without, observe))(start, batch, {})
    for ours, theirs in zip(
        jax.tree.leaves(new["params"]["denoiser"]), jax.tree.leaves(expected["params"]["denoiser"]), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)
    for before, now in zip(
        jax.tree.leaves(state["params"]["projector"]), jax.tree.leaves(new["params"]["projector"]), strict=True
    ):
        np.testing.assert_array_equal(before, now)


def test_flops_of_the_projectors():
    """Multiply-adds counted twice; 256 tokens of a model of width 1024, features of width 768."""
    config = irepa256.get_config("deco")
    without = config.copy_and_resolve_references()
    without.loss.repa_weight = 0.0
    teacher = flops.frozen(config)
    by_hand = 6 * 256 * 9 * 1024 * 768
    assert flops.training(config) - flops.training(without) - teacher == pytest.approx(by_hand)
    config.loss.repa_projector = "transformer"
    blocks = 2 * (256 * (4 + 8) * 1024**2 + 2 * 256**2 * 1024)
    by_hand = 6 * (blocks + 256 * 1024 * 768)
    assert flops.training(config) - flops.training(without) - teacher == pytest.approx(by_hand)


def test_teachers_are_one_network_for_all_losses():
    config = cifar10.get_config("deco_repa-smoke")
    config.loss.dino_weight = 0.1
    method = make_method(config)
    assert list(method.frozen) == ["teacher"]
    assert method.features == ("teacher",)
