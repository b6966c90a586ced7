"""Turns encoded images into uint8 pixels of one size, as ADM (guided-diffusion) prepares ImageNet."""

from __future__ import annotations

import io
import math
import warnings

import numpy as np
from PIL import Image

# PIL warns about damaged metadata and large images; for what it cannot read it raises, and only that matters here.
warnings.filterwarnings("ignore", module=r"PIL\.")


MIN_CROP = 0.8  # the least share of the shorter side that a random crop shows


def image_sides(size: int | tuple[int, int]) -> tuple[int, int]:
    """Return (height, width) of config.data.image_size."""
    return (size, size) if isinstance(size, int) else tuple(size)  # type: ignore[return-value]


def decode(image: bytes | str | np.ndarray) -> Image.Image:
    """Return an RGB picture from a file's bytes, its path, or uint8 pixels `[height, width]` or `[height, width, 3]`.

    CMYK, palette and gray images are converted, alpha is dropped, 16-bit gray is scaled to 8 bits; EXIF
    orientation is not applied (ADM's `.convert("RGB")`). Raises whatever PIL raises for a file it cannot read.
    """
    if isinstance(image, np.ndarray):
        return Image.fromarray(image).convert("RGB")
    with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as picture:
        # Dropped by the conversion anyway; but PIL refuses or warns about some kinds of it.
        picture.info.pop("transparency", None)
        if picture.mode.startswith("I"):  # PIL's own conversion clips 16 bits at 255
            levels = np.clip(np.asarray(picture).astype(np.int64), 0, 65535)
            return Image.fromarray(((levels + 128) // 257).astype(np.uint8)).convert("RGB")
        if picture.mode == "RGB":  # PIL's conversion would copy it, which takes half as long as decoding a JPEG
            picture.load()
            return picture
        return picture.convert("RGB")


def center_crop(image: Image.Image, size: tuple[int, int], fast: bool = False) -> np.ndarray:
    """Return the centre of an RGB picture as uint8 `[height, width, 3]`; `size` is (height, width).

    ADM's crop, which is DeCo's preprocessing too: halve by box averaging while both sides stay at least twice
    the target, resize bicubically until the target is just covered, cut its centre out. Raises ValueError where
    the picture is so elongated that covering the target would take more pixels than PIL accepts.

    `fast` resizes only what the cut keeps. PIL takes that window in float32, so a pixel in some thousands comes out one
    level brighter or darker.
    """
    height, width = size
    while image.width >= 2 * width and image.height >= 2 * height:
        image = image.resize((image.width // 2, image.height // 2), resample=Image.Resampling.BOX)
    scale = max(width / image.width, height / image.height)
    covering = round(image.width * scale), round(image.height * scale)
    _check_elongation(image, covering, size)
    top, left = (covering[1] - height) // 2, (covering[0] - width) // 2
    window = (left, top, left + width, top + height)
    if fast:
        across, down = image.width / covering[0], image.height / covering[1]
        box = (left * across, top * down, (left + width) * across, (top + height) * down)
        return np.asarray(image.resize((width, height), resample=Image.Resampling.BICUBIC, box=box))
    return np.asarray(image.resize(covering, resample=Image.Resampling.BICUBIC).crop(window))


def random_crop(image: Image.Image, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Return a random part of an RGB picture as uint8 `[height, width, 3]`; `size` is (height, width).

    As ADM's random crop: the picture is made to cover the target enlarged by a factor from 1 to 1.25, and the target is
    cut out of it anywhere. Raises as `center_crop`.
    """
    height, width = size
    factor = rng.uniform(1, 1 / MIN_CROP)
    tall, wide = round(height * factor), round(width * factor)
    scale = max(wide / image.width, tall / image.height)
    # Of the covering picture only what may be cut: all of the longer side, so that every part has its chance.
    covering = max(tall, round(image.height * scale)), max(wide, round(image.width * scale))
    _check_elongation(image, covering, size)
    pixels = center_crop(image, covering)
    top, left = rng.integers(covering[0] - height + 1), rng.integers(covering[1] - width + 1)
    return pixels[top : top + height, left : left + width]


def _check_elongation(image: Image.Image, covering: tuple[int, int], size: tuple[int, int]) -> None:
    if math.prod(covering) > max(Image.MAX_IMAGE_PIXELS or 0, 16 * math.prod(size)):
        raise ValueError(f"an image of {image.width}×{image.height} pixels is too elongated for {size[1]}×{size[0]}")


def flip(image: np.ndarray) -> np.ndarray:
    """Mirror an image `[height, width, 3]` left to right."""
    return image[:, ::-1]
