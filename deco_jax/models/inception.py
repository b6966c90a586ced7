"""The 2015 Inception network that FID, sFID and the Inception Score are defined on, and its TF1 resize.

    uint8 [B, H, W, 3] -> resize to 299 -> (x - 128) / 128 -> network -> pool3      [B, 2048]   FID, precision, recall
                                                                      -> spatial    [B, 2023]   sFID
                                                                      -> log-softmax [B, 1008]  Inception Score

The network is "Rethinking the Inception Architecture" (arXiv 1512.00567) as frozen on 2015-12-05. It differs from later
Inception-v3 releases: its average pools leave the padding out of the mean and its last block pools by maximum.
Modules carry the names of that graph (`mixed_6/tower_1/conv_2`), so a weight table is a list of names.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from deco_jax.errors import UserError
from deco_jax.run.devices import place

SIZE = 299
POOL3_WIDTH = 2048
SPATIAL_CHANNELS = 7
SPATIAL_WIDTH = 17 * 17 * SPATIAL_CHANNELS
NUM_CLASSES = 1008

PreciseLike = jax.lax.Precision | str | None


class Features(NamedTuple):
    """What the network says of n images, float32."""

    pool3: Any  # [n, 2048]
    spatial: Any  # [n, 2023]
    log_softmax: Any | None  # [n, 1008]; None if the weights have no classifier


# --- resize ----------------------------------------------------------------------------------------------------------


def _interpolation(size_in: int, size_out: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return each output's lower and upper neighbour and the share of the upper one, in TF1's float32 steps."""
    scale = np.float32(size_in) / np.float32(size_out)
    position = np.arange(size_out, dtype=np.float32) * scale
    lower = np.minimum(np.floor(position).astype(np.int32), size_in - 1)
    upper = np.minimum(lower + 1, size_in - 1)
    return lower, upper, position - lower.astype(np.float32)


def resize_tf1(images: jax.Array, size: int = SIZE) -> jax.Array:
    """Resize by TensorFlow 1's `resize_bilinear`: corner-anchored (no half-pixel offset), no antialiasing.

    images: [batch, height, width, channels], any real type and size. Returns float32 [batch, size, size, channels] in
    the input's range.
    """
    _, height, width, _ = images.shape
    left, right, share_x = _interpolation(width, size)
    top, bottom, share_y = _interpolation(height, size)

    def pick(x: jax.Array, index: np.ndarray, axis: int) -> jax.Array:
        return jnp.take(x, index, axis=axis, mode="clip").astype(jnp.float32)

    x0, x1 = pick(images, left, 2), pick(images, right, 2)
    rows = x0 + (x1 - x0) * share_x[:, None]  # [batch, height, size, channels]
    y0, y1 = pick(rows, top, 1), pick(rows, bottom, 1)
    return y0 + (y1 - y0) * share_y[:, None, None]


def preprocess(images: jax.Array) -> jax.Array:
    """Bring uint8 [batch, height, width, 3] to the network's float32 [batch, 299, 299, 3], about [-1, 1)."""
    return (resize_tf1(images) - 128.0) * (1.0 / 128.0)


# --- layers ----------------------------------------------------------------------------------------------------------


class Settings(NamedTuple):
    """The arithmetic of every convolution."""

    dtype: DTypeLike = jnp.float32
    precision: PreciseLike = jax.lax.Precision.HIGHEST


class ConvUnit(nnx.Module):
    """Convolution, folded batch-norm, ReLU. Kernel [h, w, in, out]."""

    def __init__(
        self,
        width_in: int,
        width_out: int,
        kernel: int | tuple[int, int],
        settings: Settings,
        stride: int = 1,
        padding: str = "SAME",
    ):
        size = (kernel, kernel) if isinstance(kernel, int) else kernel
        self.kernel = nnx.Param(jnp.zeros((*size, width_in, width_out), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((width_out,), jnp.float32))
        self.stride, self.padding, self.settings = stride, padding, settings

    def __call__(self, x: jax.Array) -> jax.Array:
        dtype, precision = self.settings
        x = jax.lax.conv_general_dilated(
            x.astype(dtype),
            self.kernel[...].astype(dtype),
            (self.stride, self.stride),
            self.padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=precision,
        )
        return jax.nn.relu(x + self.bias[...].astype(dtype))


class Tower(nnx.Module):
    """Units in a row, named conv, conv_1, conv_2, ..., from (width, kernel) or (width, kernel, stride)."""

    def __init__(self, width_in: int, rows: list[tuple], settings: Settings):
        self.names = tuple("conv" if i == 0 else f"conv_{i}" for i in range(len(rows)))
        for name, (width, kernel, *strided) in zip(self.names, rows, strict=True):
            # the towers pad every stride-1 convolution and no strided one
            stride, padding = (strided[0], "VALID") if strided else (1, "SAME")
            setattr(self, name, ConvUnit(width_in, width, kernel, settings, stride, padding))
            width_in = width

    def __call__(self, x: jax.Array) -> jax.Array:
        for name in self.names:
            x = getattr(self, name)(x)
        return x


def max_pool(x: jax.Array, stride: int, padding: str) -> jax.Array:
    """Take the 3x3 maximum."""
    lowest = jnp.array(-jnp.inf, x.dtype)
    return jax.lax.reduce_window(x, lowest, jax.lax.max, (1, 3, 3, 1), (1, stride, stride, 1), padding)


def average_pool(x: jax.Array) -> jax.Array:
    """Take the 3x3 mean over the pixels that exist: the padding counts neither in the sum nor in the number."""
    zero = jnp.array(0, x.dtype)
    total = jax.lax.reduce_window(x, zero, jax.lax.add, (1, 3, 3, 1), (1, 1, 1, 1), "SAME")
    along = [np.minimum(np.arange(n) + 1, n - 1) - np.maximum(np.arange(n) - 1, 0) + 1 for n in x.shape[1:3]]
    return total * jnp.asarray(1.0 / np.multiply.outer(*along), x.dtype)[None, :, :, None]


class BlockA(nnx.Module):
    """35x35: 1x1, 5x5, double 3x3 and pooled branches."""

    def __init__(self, width_in: int, pooled: int, settings: Settings):
        self.conv = ConvUnit(width_in, 64, 1, settings)
        self.tower = Tower(width_in, [(48, 1), (64, 5)], settings)
        self.tower_1 = Tower(width_in, [(64, 1), (96, 3), (96, 3)], settings)
        self.tower_2 = Tower(width_in, [(pooled, 1)], settings)

    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.concatenate([self.conv(x), self.tower(x), self.tower_1(x), self.tower_2(average_pool(x))], -1)


class BlockB(nnx.Module):
    """35x35 to 17x17."""

    def __init__(self, width_in: int, settings: Settings):
        self.conv = ConvUnit(width_in, 384, 3, settings, 2, "VALID")
        self.tower = Tower(width_in, [(64, 1), (96, 3), (96, 3, 2)], settings)

    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.concatenate([self.conv(x), self.tower(x), max_pool(x, 2, "VALID")], -1)


class BlockC(nnx.Module):
    """17x17: 7x7 convolutions factorised into 1x7 and 7x1."""

    def __init__(self, width_in: int, inner: int, settings: Settings):
        row, column = (1, 7), (7, 1)
        self.conv = ConvUnit(width_in, 192, 1, settings)
        self.tower = Tower(width_in, [(inner, 1), (inner, row), (192, column)], settings)
        self.tower_1 = Tower(
            width_in, [(inner, 1), (inner, column), (inner, row), (inner, column), (192, row)], settings
        )
        self.tower_2 = Tower(width_in, [(192, 1)], settings)

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return the block's output, and that of its first branch, which sFID reads."""
        first = self.conv(x)
        parts = [first, self.tower(x), self.tower_1(x), self.tower_2(average_pool(x))]
        return jnp.concatenate(parts, -1), first


class BlockD(nnx.Module):
    """17x17 to 8x8."""

    def __init__(self, width_in: int, settings: Settings):
        self.tower = Tower(width_in, [(192, 1), (320, 3, 2)], settings)
        self.tower_1 = Tower(width_in, [(192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3, 2)], settings)

    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.concatenate([self.tower(x), self.tower_1(x), max_pool(x, 2, "VALID")], -1)


class BlockE(nnx.Module):
    """8x8: 3x3 convolutions split into parallel 1x3 and 3x1."""

    def __init__(self, width_in: int, pool: Callable[[jax.Array], jax.Array], settings: Settings):
        row, column = (1, 3), (3, 1)
        self.pool = pool
        self.conv = ConvUnit(width_in, 320, 1, settings)
        self.tower_conv = ConvUnit(width_in, 384, 1, settings)
        self.tower_mixed_conv = ConvUnit(384, 384, row, settings)
        self.tower_mixed_conv_1 = ConvUnit(384, 384, column, settings)
        self.tower_1_conv = ConvUnit(width_in, 448, 1, settings)
        self.tower_1_conv_1 = ConvUnit(448, 384, 3, settings)
        self.tower_1_mixed_conv = ConvUnit(384, 384, row, settings)
        self.tower_1_mixed_conv_1 = ConvUnit(384, 384, column, settings)
        self.tower_2_conv = ConvUnit(width_in, 192, 1, settings)

    def __call__(self, x: jax.Array) -> jax.Array:
        a = self.tower_conv(x)
        b = self.tower_1_conv_1(self.tower_1_conv(x))
        parts = [self.conv(x), self.tower_mixed_conv(a), self.tower_mixed_conv_1(a)]
        parts += [self.tower_1_mixed_conv(b), self.tower_1_mixed_conv_1(b), self.tower_2_conv(self.pool(x))]
        return jnp.concatenate(parts, -1)


def _max_pool_same(x: jax.Array) -> jax.Array:
    return max_pool(x, 1, "SAME")


class Inception(nnx.Module):
    """The network, for inference only; parameters start at zero and come from `deco_jax.models.inception_weights`.

    classifier: whether the weights have one. dtype, precision: of the convolutions; results are float32.
    """

    def __init__(
        self,
        classifier: bool = True,
        dtype: DTypeLike = jnp.float32,
        precision: PreciseLike = jax.lax.Precision.HIGHEST,
    ):
        s = Settings(dtype, precision)
        self.settings = s
        self.conv = ConvUnit(3, 32, 3, s, 2, "VALID")
        self.conv_1 = ConvUnit(32, 32, 3, s, padding="VALID")
        self.conv_2 = ConvUnit(32, 64, 3, s)
        self.conv_3 = ConvUnit(64, 80, 1, s)
        self.conv_4 = ConvUnit(80, 192, 3, s, padding="VALID")
        self.mixed = BlockA(192, 32, s)
        self.mixed_1 = BlockA(256, 64, s)
        self.mixed_2 = BlockA(288, 64, s)
        self.mixed_3 = BlockB(288, s)
        self.mixed_4 = BlockC(768, 128, s)
        self.mixed_5 = BlockC(768, 160, s)
        self.mixed_6 = BlockC(768, 160, s)
        self.mixed_7 = BlockC(768, 192, s)
        self.mixed_8 = BlockD(768, s)
        self.mixed_9 = BlockE(1280, average_pool, s)
        self.mixed_10 = BlockE(2048, _max_pool_same, s)
        self.classifier = nnx.Param(jnp.zeros((POOL3_WIDTH, NUM_CLASSES), jnp.float32)) if classifier else None

    @jax.named_scope("inception")
    def __call__(self, images: jax.Array) -> Features:
        """images: what `preprocess` returns, [batch, 299, 299, 3] (other sizes run too; `spatial` is then wider)."""
        x = self.conv_2(self.conv_1(self.conv(images)))
        x = self.conv_4(self.conv_3(max_pool(x, 2, "VALID")))
        x = self.mixed_2(self.mixed_1(self.mixed(max_pool(x, 2, "VALID"))))  # [batch, 35, 35, 288]
        x = self.mixed_3(x)  # [batch, 17, 17, 768]
        x, _ = self.mixed_4(x)
        x, _ = self.mixed_5(x)
        x, first = self.mixed_6(x)
        spatial = first[..., :SPATIAL_CHANNELS].astype(jnp.float32)
        x, _ = self.mixed_7(x)
        x = self.mixed_10(self.mixed_9(self.mixed_8(x)))  # [batch, 8, 8, 2048]
        pool3 = jnp.mean(x.astype(jnp.float32), axis=(1, 2))
        log_softmax = None
        if self.classifier is not None:
            # the suite's softmax leaves the classifier's bias out
            logits = jnp.dot(pool3, self.classifier[...], precision=self.settings.precision)
            log_softmax = jax.nn.log_softmax(logits)
        return Features(pool3, spatial.reshape(spatial.shape[0], -1), log_softmax)


# --- many images -----------------------------------------------------------------------------------------------------


def check_images(images: Any, what: str = "images") -> None:
    """uint8 [n, height, width, 3], or a UserError that says what they are instead. Anything with shape and dtype."""
    if np.dtype(images.dtype) != np.uint8:
        raise UserError(
            f"{what}: {images.dtype} values; the Inception network takes uint8 in 0..255: scale, clip and round first"
        )
    shape = tuple(images.shape)
    if len(shape) != 4 or shape[-1] != 3 or 0 in shape[1:]:
        raise UserError(f"{what}: shape {shape}; expected [images, height, width, 3]")


def make_apply(
    mesh: Mesh,
    has_classifier: bool = True,
    dtype: DTypeLike = jnp.float32,
    precision: PreciseLike = jax.lax.Precision.HIGHEST,
) -> tuple[Any, dict]:
    """Return the jitted (params, uint8 images split over the mesh) → Features on every device, and params' shapes."""
    graph, abstract = nnx.split(nnx.eval_shape(lambda: Inception(has_classifier, dtype, precision)))

    def apply(params: dict, images: jax.Array) -> Features:
        model = nnx.merge(graph, nnx.State(jax.tree.map(nnx.Param, params)))
        return model(preprocess(images))

    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), nnx.to_pure_dict(abstract))
    return jax.jit(apply, out_shardings=NamedSharding(mesh, PartitionSpec())), shapes


class FeatureExtractor:
    """Turns uint8 images into features, one batch of a fixed size at a time, on the accelerators.

    Args:
        params: from `inception_weights.load_inception`.
        batch_size: of all devices together; rounded up to a multiple of them.
        mesh: the batch is split over all its axes. With several processes each passes the same images and gets all
            features.
        dtype, precision: of the convolutions; published scores need float32 and HIGHEST.
    """

    def __init__(
        self,
        params: dict,
        batch_size: int = 64,
        mesh: Mesh | None = None,
        dtype: DTypeLike = jnp.float32,
        precision: PreciseLike = jax.lax.Precision.HIGHEST,
    ):
        if batch_size < 1:
            raise UserError(f"batch size {batch_size} for the Inception network; it must be at least 1")
        self.has_classifier = "classifier" in params
        if mesh is None:
            mesh = Mesh(np.array(jax.local_devices()[:1]), ("data",))
        self.batch_size = -(-batch_size // mesh.size) * mesh.size
        self._images = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        whole = NamedSharding(mesh, PartitionSpec())
        self._apply, shapes = make_apply(mesh, self.has_classifier, dtype, precision)
        if jax.tree.map(lambda a: a.shape, shapes) != jax.tree.map(np.shape, params):
            raise ValueError("the parameters are not those of the 2015 Inception network")
        self._params = jax.tree.map(lambda a: place(np.asarray(a), whole), params)

    def __call__(self, images: np.ndarray) -> Features:
        """images: uint8 [n, height, width, 3], any n and size; each new size compiles once. Returns NumPy features."""
        check_images(images)
        results = []
        for start in range(0, len(images), self.batch_size):
            batch = np.asarray(images[start : start + self.batch_size])
            used = len(batch)
            if used < self.batch_size:  # a short batch would compile anew
                batch = np.concatenate([batch, np.zeros((self.batch_size - used, *batch.shape[1:]), np.uint8)])
            results.append((used, self._apply(self._params, place(batch, self._images))))
        return Features(*(self._gather(results, i) for i in range(len(Features._fields))))

    def _gather(self, results: list[tuple[int, Features]], field: int) -> np.ndarray | None:
        if field == 2 and not self.has_classifier:
            return None
        width = (POOL3_WIDTH, SPATIAL_WIDTH, NUM_CLASSES)[field]
        parts = [np.asarray(features[field])[:used] for used, features in results]
        return np.concatenate([np.zeros((0, width), np.float32), *parts])
