"""Between uint8 pixels and the model's range, and grids of images."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np


def to_float(images: jax.Array) -> jax.Array:
    """uint8 0..255 → float32 in [−1, 1]."""
    return images.astype(jnp.float32) / 127.5 - 1


def to_uint8(images: jax.Array) -> jax.Array:
    """float in [−1, 1] → uint8: clip (x + 1)·127.5 + 0.5 to [0, 255] and truncate, as the reference saves samples."""
    return jnp.clip((images.astype(jnp.float32) + 1) * 127.5 + 0.5, 0, 255).astype(jnp.uint8)


def grid(images: np.ndarray, columns: int | None = None, gap: int = 2) -> np.ndarray:
    """Tile uint8 [count, height, width, 3] row by row into one uint8 image on white, near square unless told."""
    count, height, width, channels = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    canvas = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, channels), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = (i // columns) * (height + gap) + gap, (i % columns) * (width + gap) + gap
        canvas[top : top + height, left : left + width] = image
    return canvas


def class_grid(images: np.ndarray, num_classes: int) -> np.ndarray:
    """A grid of images in class order: a row for each class if they come out even, else near square."""
    count = len(images)
    per_class = count // num_classes if num_classes and count % num_classes == 0 else 0
    return grid(images, columns=per_class if per_class > 1 else None)


def sample_grid(images: np.ndarray, num_classes: int) -> np.ndarray:
    """`class_grid`, small images enlarged until the longer side is about 720 pixels."""
    tiled = class_grid(images, num_classes)
    return enlarge(tiled, max(1, round(720 / max(tiled.shape[:2]))))


def enlarge(image: np.ndarray, factor: int) -> np.ndarray:
    """Repeat each pixel factor × factor times: small images stay visible and exact."""
    return image.repeat(factor, axis=0).repeat(factor, axis=1)
