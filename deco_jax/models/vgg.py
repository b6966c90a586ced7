"""VGG16: LPIPS, which tells how alike two images look, and a teacher where no other one can be had.

Sources: Zhang et al. 2018 (LPIPS, version 0.1); Simonyan & Zisserman 2015 (VGG16).
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx
from jax.nn import initializers

from deco_jax.convert.mapping import VECTOR, Row, one_to_one, to_ours
from deco_jax.convert.torch_files import read_weights
from deco_jax.errors import UserError
from deco_jax.models.layers import Dtype, normalize
from deco_jax.models.network import FrozenNetwork, Network, View, functional

# Channels of the convolutions in each group; 2×2 max-pooling stands between groups, a tap ends each one.
GROUPS: tuple[tuple[int, ...], ...] = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
# Of images in ±1; the published network's own rounding of ImageNet's mean and deviation.
SHIFT = np.array([-0.030, -0.088, -0.188], np.float32)
SCALE = np.array([0.458, 0.448, 0.450], np.float32)
EPSILON = 1e-10
# Positions of a grid up to which a convolution is written as a matrix product. On a CPU XLA takes 2.1 s for one of
# VGG16's last convolutions at 2×2 (64 images, one core), and 10 ms for the product; at 3×3 both take 20 ms.
TINY_GRID = 8
PATCH = 16  # of the published students; by default others' images are resized to as many pixels a patch

VGG_URL = "https://download.pytorch.org/models/vgg16-397923af.pth"
LPIPS_URL = "https://github.com/richzhang/PerceptualSimilarity/tree/master/lpips/weights/v0.1 (vgg.pth)"

CONVOLUTION = one_to_one(
    "[out, in, height, width] to [height, width, in, out]",
    4,
    lambda w: w.transpose(2, 3, 1, 0),
    lambda k: k.transpose(3, 2, 0, 1),
)
LINEAR = one_to_one(
    "[1, channels, 1, 1] to [channels]", 4, lambda w: w.reshape(w.shape[1]), lambda a: a[None, :, None, None]
)


# The taps by number → channels of their features.
TAPS = {str(number): group[-1] for number, group in enumerate(GROUPS, start=1)}

# How its parameters are split, see `run.sharding`.
RULES = ((r"(lpips|teacher)/convolutions/\d+/kernel$", -1), (r"lpips/weights/\d+$", None))


class Convolution(nnx.Conv):
    """A 3×3 convolution that keeps the grid's size, quick on tiny grids too."""

    def __call__(self, x: jax.Array) -> jax.Array:  # type: ignore[override]
        """Return the convolution of [batch, height, width, channels]."""
        height, width, channels = x.shape[1:]
        if height * width > TINY_GRID:
            return super().__call__(x)
        x = jnp.pad(x.astype(self.dtype), ((0, 0), (1, 1), (1, 1), (0, 0)))
        shifted = [x[:, i : i + height, j : j + width] for i, j in itertools.product(range(3), repeat=2)]
        assert self.bias is not None
        kernel, bias = self.kernel[...].astype(self.dtype), self.bias[...].astype(self.dtype)
        return jnp.concatenate(shifted, axis=-1) @ kernel.reshape(9 * channels, -1) + bias


def max_pool(x: jax.Array) -> jax.Array:
    """Return the largest of each 2×2 positions of [batch, height, width, channels]; an odd last row or column is left
    out. A gradient goes to the first of equal values, as in PyTorch.

    Comparisons: the gradient of XLA's own windows takes a CPU twice as long as all of this.
    """
    height, width = x.shape[1] // 2 * 2, x.shape[2] // 2 * 2
    upper, lower = (
        jnp.where(left >= right, left, right)
        for left, right in ((x[:, i:height:2, :width:2], x[:, i:height:2, 1:width:2]) for i in range(2))
    )
    return jnp.where(upper >= lower, upper, lower)


class VGG16(nnx.Module):
    """VGG16's convolutions.

    Args:
        groups: how many of `GROUPS`.
        dtype: compute dtype.
    """

    def __init__(self, groups: int = len(GROUPS), *, dtype: Dtype = jnp.float32, rngs: nnx.Rngs) -> None:
        self.dtype, self.groups = dtype, GROUPS[:groups]
        he = initializers.variance_scaling(2.0, "fan_in", "normal")
        widths = [3, *(width for group in self.groups for width in group)]
        self.convolutions = nnx.List(
            Convolution(fan_in, fan_out, (3, 3), padding=1, kernel_init=he, dtype=dtype, rngs=rngs)
            for fan_in, fan_out in itertools.pairwise(widths)
        )

    def taps(self, images: jax.Array, patch_size: int = PATCH, pixels: int = PATCH) -> list[jax.Array]:
        """Return the features after the last ReLU of each group, [batch, height, width, channels] each.

        Args:
            images: [batch, height, width, 3] in ±1.
            patch_size: of the student. Its images are resized first (bilinear, antialiased), so that
            pixels: are the side of a patch.
        """
        batch, height, width, _ = images.shape
        if patch_size != pixels:
            shape = (batch, height * pixels // patch_size, width * pixels // patch_size, 3)
            images = jax.image.resize(images, shape, "linear")
        h = ((images - SHIFT) / SCALE).astype(self.dtype)
        found, convolution = [], iter(self.convolutions)
        for number, group in enumerate(self.groups):
            if number:
                h = max_pool(h)
            for _ in group:
                h = jax.nn.relu(next(convolution)(h))
            found.append(h)
        return found


class Tap(VGG16):
    """VGG16 up to one of its taps, as a teacher."""

    @jax.named_scope("teacher")
    def __call__(self, images: jax.Array, patch_size: int) -> View:
        """Return the tap's features of each patch of the student; in place of a class token their mean, normalised.

        Args:
            images: [batch, height, width, 3], uint8 or in [0, 1].
            patch_size: of the student; see `taps`.
        """
        x = images.astype(jnp.float32)
        x = x / 127.5 - 1 if images.dtype == jnp.uint8 else 2 * x - 1
        features = self.taps(x, patch_size, 2 ** (len(self.groups) - 1))[-1].astype(jnp.float32)
        tokens = features.reshape(len(features), -1, features.shape[-1])
        return View(tokens, normalize(jnp.mean(tokens, axis=1)))


class LPIPS(VGG16):
    """VGG16's convolutions and the five linear layers that weigh their features.

    Args:
        dtype: compute dtype of the convolutions; norms, differences and sums are float32.
    """

    def __init__(self, *, dtype: Dtype = jnp.float32, rngs: nnx.Rngs) -> None:
        super().__init__(dtype=dtype, rngs=rngs)
        self.weights = nnx.List(nnx.Param(jax.random.uniform(rngs.params(), (group[-1],))) for group in GROUPS)

    def __call__(self, images: jax.Array, others: jax.Array, patch_size: int = PATCH, pixels: int = PATCH) -> jax.Array:
        """Return the distance of each image from its counterpart.

        Args:
            images, others: [batch, height, width, 3] in ±1.
            patch_size, pixels: see `taps`.

        Returns:
            float32 [batch], 0 for equal images.
        """
        return self.distance(self.taps(images, patch_size, pixels), self.taps(others, patch_size, pixels))

    def distance(self, taps: list[jax.Array], others: list[jax.Array]) -> jax.Array:
        """Return the distance of two images' taps: float32 [batch]."""
        total: jax.Array | float = 0.0
        for weights, a, b in zip(self.weights, taps, others, strict=True):
            difference = (_unit(a) - _unit(b)) ** 2
            total = total + jnp.mean(jnp.sum(difference * weights[...], axis=-1), axis=(1, 2))
        return jnp.asarray(total)


def _unit(features: jax.Array) -> jax.Array:
    """Divide each position's channels by (their norm + 1e-10), in float32."""
    x = features.astype(jnp.float32)
    squares = jnp.sum(x * x, axis=-1, keepdims=True)
    # Where all channels are 0 the norm has no derivative, and the quotient is 0 whatever it is divided by.
    norm = jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1.0)), 0.0)
    return x / (norm + EPSILON)


def vgg_table(groups: int = len(GROUPS)) -> list[Row]:
    """Return the rows of torchvision's VGG16 up to a tap, its classifier left out."""
    rows, index, number = [], 0, 0
    for group in GROUPS[:groups]:
        for _ in group:
            for torch, ours, transform in (("weight", "kernel", CONVOLUTION), ("bias", "bias", VECTOR)):
                rows.append(Row(f"features.{index}.{torch}", f"convolutions.{number}.{ours}", transform))
            index, number = index + 2, number + 1  # a ReLU after each convolution
        index += 1  # the pooling
    return rows


def lpips_table() -> list[Row]:
    """Return the rows of the lpips package's `vgg.pth`."""
    return [Row(f"lin{i}.model.1.weight", f"weights.{i}", LINEAR) for i in range(len(GROUPS))]


def from_torch(vgg: Mapping[str, np.ndarray], lpips: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Return torchvision's VGG16 and the lpips package's linear layers as parameters of `LPIPS`.

    Raises:
        UserError: tensors are missing, left over, or of another size.
    """
    ignored = tuple(name for name in vgg if name.startswith("classifier."))
    convolutions = to_ours(vgg_table(), vgg, ignore=ignored, what="the file of VGG16")
    return _numbered(convolutions | to_ours(lpips_table(), lpips, what="the file of LPIPS's linear layers"))


def _numbered(params: Mapping[str, Any]) -> dict[str, Any]:
    """Name the entries of lists of modules as Flax does, by numbers."""
    return {name: {int(number): value for number, value in entries.items()} for name, entries in params.items()}


def load_lpips(vgg: str | os.PathLike[str], lpips: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the parameters of `LPIPS` from torchvision's and the lpips package's files.

    Raises:
        UserError: a path isn't set or a file is missing (with where to get it), damaged, or of another layout.
    """
    files = (("VGG16's", vgg, VGG_URL), ("LPIPS's linear layers'", lpips, LPIPS_URL))
    return from_torch(*(read_weights(path, what, f"download {url}") for what, path, url in files))


def teacher(tap: str, path: str, dtype: str, patch_size: int) -> FrozenNetwork:
    """Return VGG16 up to a tap as (params, images) → `View`, images [batch, height, width, 3], uint8 or in [0, 1].

    Args:
        tap: "1" to "5".
        path: of torchvision's file.
        dtype: that the convolutions are kept and computed in.
        patch_size: of the student, whose tokens' features these are.
    """
    groups, kind = int(tap), jnp.dtype(dtype)
    network = functional(lambda rngs: Tap(groups, dtype=kind, rngs=rngs), kind)

    def load() -> dict[str, Any]:
        rows, tensors = vgg_table(groups), read_weights(path, "VGG16's", f"download {VGG_URL}")
        used = {name for row in rows for names in row.torch_names() for name in names}
        return _numbered(to_ours(rows, {name: tensors[name] for name in tensors if name in used}, what=path))

    return _frozen(
        network,
        kind,
        lambda params, images: network.apply(params, images, patch_size),
        load,
        lambda height, width: flops((height, width), patch_size, groups, 2 ** (groups - 1)),
    )


def _frozen(
    network: Network, kind: Any, apply: Callable[..., Any], load: Callable[[], Any], flops: Callable[..., float]
) -> FrozenNetwork:
    """Keep the kernels in `kind`."""

    def keep(tree: Any) -> Any:
        def kept(path: tuple[Any, ...], leaf: Any) -> Any:
            return leaf.astype(kind) if path[-1].key == "kernel" else leaf

        return jax.tree_util.tree_map_with_path(kept, tree)

    return FrozenNetwork(apply, jax.eval_shape(keep, network.shapes), lambda: keep(load()), flops)


def frozen_lpips(vgg: str, lpips: str, dtype: str, patch_size: int, pixels: int = PATCH) -> FrozenNetwork:
    """Return LPIPS as (params, images, others) → float32 [batch], images [batch, height, width, 3] in ±1.

    Args:
        vgg, lpips: paths of the weights, see `load_lpips`.
        dtype: that the convolutions are kept and computed in.
        patch_size: of the student.
        pixels: to which a patch's side is resized, see `LPIPS.taps`; 0: no resizing.
    """
    pixels = pixels or patch_size
    kind = jnp.dtype(dtype)
    network = functional(lambda rngs: LPIPS(dtype=kind, rngs=rngs), kind)
    return _frozen(
        network,
        kind,
        lambda params, images, others: network.apply(params, images, others, patch_size, pixels),
        lambda: load_lpips(vgg, lpips),
        lambda size: flops(size, patch_size, pixels=pixels),
    )


def check_size(image_size: tuple[int, int], patch_size: int, pixels: int) -> None:
    """Raise UserError if LPIPS would see images that are smaller than one position of its last tap.

    Args:
        image_size: (height, width) of the student's images.
        patch_size, pixels: see `frozen_lpips`.
    """
    smallest = 2 ** (len(GROUPS) - 1)
    side = min(image_size) * (pixels or patch_size) // patch_size
    if side < smallest:
        raise UserError(
            f"LPIPS would see images of {side} pixels a side and needs {smallest}; set config.lpips.pixels_per_patch "
            "higher"
        )


def make_lpips(config: ml_collections.ConfigDict) -> FrozenNetwork:
    """Return LPIPS by config.lpips, for the images of a config's model; see `frozen_lpips`. Reads no file yet."""
    lpips = config.lpips
    return frozen_lpips(lpips.vgg, lpips.linear, lpips.dtype, config.model.patch_size, lpips.pixels_per_patch)


def flops(size: tuple[int, int], patch_size: int = PATCH, groups: int = len(GROUPS), pixels: int = PATCH) -> float:
    """Return the FLOPs of the convolutions of the first groups on one image of (height, width) pixels; see `taps`."""
    area = size[0] * size[1] * (pixels / patch_size) ** 2
    total, fan_in = 0.0, 3
    for number, group in enumerate(GROUPS[:groups]):
        for width in group:
            total += 2 * 9 * fan_in * width * area / 4**number
            fan_in = width
    return total
