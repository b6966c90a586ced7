"""LPIPS against the published implementation: by weights that a rule makes, and by the real ones where they are."""

import contextlib
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.signal import correlate

from deco_jax import flops
from deco_jax.config import default_config
from deco_jax.errors import UserError
from deco_jax.method.losses import perceptual
from deco_jax.models import vgg
from deco_jax.models.network import functional
from tests.helpers import golden, lpips_files, lpips_params, relative_error

NETWORK = functional(lambda rngs: vgg.LPIPS(rngs=rngs))


def check(params: dict, size: int, weights: str) -> None:
    g = golden("beyond")
    target = g[f"lpips/{size}/target"]

    def distance(images: jax.Array) -> jax.Array:
        return NETWORK.apply(params, images, target)

    with jax.default_matmul_precision("highest"):
        distances, pull = jax.vjp(distance, g[f"lpips/{size}/prediction"])
        (gradient,) = pull(jnp.ones(3))
    assert relative_error(distances, g[f"lpips/{size}/{weights}/distance"]) < 1e-5
    assert relative_error(gradient, g[f"lpips/{size}/{weights}/gradient"]) < 1e-4


@pytest.mark.parametrize("size", [32, 64])
def test_weights_by_rule(size):
    check(lpips_params(), size, "rule")


@pytest.mark.parametrize("size", [32, 64])
def test_published_weights(size):
    folder = os.environ.get("DECO_JAX_LPIPS")
    if not folder:
        pytest.skip("set DECO_JAX_LPIPS to a folder with torchvision's vgg16.pth and the lpips package's vgg.pth")
    check(vgg.load_lpips(f"{folder}/vgg16.pth", f"{folder}/vgg.pth"), size, "published")


def test_equal_images_have_distance_and_gradient_zero():
    images = jnp.zeros((1, 32, 32, 3))
    value, gradient = jax.value_and_grad(lambda x: jnp.sum(NETWORK.apply(lpips_params(), x, images)))(images)
    assert value == 0
    assert np.all(np.isfinite(gradient))
    assert not np.any(gradient)


def test_small_patches_see_larger_images():
    """As many VGG pixels a patch as with patches of 16."""
    shapes = jax.eval_shape(lambda x: vgg.LPIPS(rngs=nnx.Rngs(0)).taps(x, 8), jnp.zeros((1, 32, 48, 3)))
    assert [shape.shape[1:3] for shape in shapes] == [(64, 96), (32, 48), (16, 24), (8, 12), (4, 6)]


@pytest.mark.parametrize("grid", [(1, 1), (2, 2), (2, 4), (1, 8), (3, 3)])
def test_convolution_on_tiny_grids(grid):
    """Its values are scipy's; where XLA's own convolution is slow on a CPU, none is compiled."""
    module = vgg.Convolution(3, 5, (3, 3), padding=1, rngs=nnx.Rngs(0))
    module.bias[...] = jnp.arange(5.0)
    x = np.random.default_rng(0).normal(size=(2, *grid, 3)).astype(np.float32)
    # The window of three channels over three of them leaves one: index 1 of "same".
    expected = [
        [correlate(image, module.kernel[..., out], mode="same")[..., 1] + out for out in range(5)] for image in x
    ]
    np.testing.assert_allclose(module(x), np.moveaxis(expected, 1, -1), atol=2e-6)
    compiled = jax.jit(lambda x: module(x)).lower(x).as_text()
    assert ("convolution(" in compiled) == (grid == (3, 3))


@pytest.mark.parametrize("grid", [(4, 6), (5, 7)])
def test_max_pool(grid):
    """Its values and gradients are those of XLA's windows, also where values are equal."""
    x = jax.random.randint(jax.random.key(0), (3, *grid, 8), 0, 3).astype(jnp.float32)
    weights = jax.random.normal(jax.random.key(1), (3, grid[0] // 2, grid[1] // 2, 8))
    ours, theirs = (jax.vjp(pool, x) for pool in (vgg.max_pool, lambda x: nnx.max_pool(x, (2, 2), strides=(2, 2))))
    np.testing.assert_array_equal(ours[0], theirs[0])
    np.testing.assert_array_equal(*(pull(weights)[0] for _, pull in (ours, theirs)))


def test_a_missing_file_says_where_to_get_it(tmp_path):
    with pytest.raises(UserError, match="no VGG16's weights there; download https://"):
        vgg.load_lpips(tmp_path / "vgg16.pth", tmp_path / "vgg.pth")


@pytest.mark.parametrize(("pixels", "side"), [(0, 32), (4, 32), (16, 128)])
def test_pixels_per_patch(pixels, side, tmp_path):
    """The loss of a config with patches of 4 has the published distances where nothing is resized."""
    config = default_config()
    config.model.patch_size, config.lpips.pixels_per_patch, config.lpips.dtype = 4, pixels, "float32"
    config.lpips.vgg, config.lpips.linear = (argument.split("=")[1] for argument in lpips_files(tmp_path))
    config.loss.lpips_weight, config.data.image_size = 0.1, (32, 32)
    network = perceptual.lpips_from_config(config).network
    g = golden("beyond")
    assert network.flops((32, 32)) == pytest.approx(vgg.flops((side, side)))
    with jax.default_matmul_precision("highest"):
        distances = network.apply(network.load(), g["lpips/32/prediction"], g["lpips/32/target"])
    same = relative_error(distances, g["lpips/32/rule/distance"]) < 1e-5
    assert same == (side == 32)


@pytest.mark.parametrize(
    "size, patch_size, pixels", [((16, 32), 4, 0), ((8, 32), 4, 0), ((8, 8), 4, 8), ((8, 8), 4, 7)]
)
def test_images_too_small_for_the_last_tap_are_refused(size, patch_size, pixels):
    images = jax.ShapeDtypeStruct((1, *size, 3), jnp.float32)
    taps = jax.eval_shape(lambda x: vgg.LPIPS(rngs=nnx.Rngs(0)).taps(x, patch_size, pixels or patch_size), images)
    fits = taps[-1].size > 0
    with contextlib.nullcontext() if fits else pytest.raises(UserError, match="pixels a side and needs 16"):
        vgg.check_size(size, patch_size, pixels)


@pytest.mark.parametrize("dtype, exact", [("float32", True), ("bfloat16", False)])
def test_float32_is_float32_on_every_device(dtype, exact):
    """GPUs and TPUs would take TensorFloat-32 and bfloat16 for products without a precision."""
    lpips, tap = vgg.frozen_lpips("", "", dtype, 16), vgg.teacher("3", "", dtype, 4)
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    with jax.default_matmul_precision("default"):  # the tests' own is the highest
        traced = [
            jax.make_jaxpr(lpips.apply)(lpips.shapes, images, images),
            jax.make_jaxpr(tap.apply)(tap.shapes, images),  # of patches that aren't resized, which is exact by itself
        ]
    for program in traced:
        assert ("Precision.HIGHEST" in str(program)) == exact


def test_flops_of_training_follow_the_resizing():
    config = default_config()
    config.model.patch_size, config.data.image_size = 4, (32, 32)
    without = flops.training(config)
    config.loss.lpips_weight = 0.1
    large = flops.training(config) - without
    config.lpips.pixels_per_patch = 0
    assert large == pytest.approx(16 * (flops.training(config) - without))
