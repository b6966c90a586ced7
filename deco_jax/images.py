"""Converts between uint8 pixels and the model's range, and makes grids of images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from deco_jax.shapes import AnyBytes, AnyFloats, Picture, Pictures, Sheet

CAPTION_SIZE, CAPTION_LINES = 11, 4  # pixels, lines


def to_float(images: AnyBytes) -> AnyFloats:
    """Convert uint8 0..255 to float32 in [−1, 1]."""
    return images.astype(jnp.float32) / 127.5 - 1


def to_uint8(images: AnyFloats) -> AnyBytes:
    """Convert float in [−1, 1] to uint8 like the reference: clip (x + 1)·127.5 + 0.5 to [0, 255] and truncate."""
    return jnp.clip((images.astype(jnp.float32) + 1) * 127.5 + 0.5, 0, 255).astype(jnp.uint8)


def grid(images: Pictures, columns: int | None = None, gap: int = 2) -> Sheet:
    """Tile uint8 [count, height, width, 3] row by row into one uint8 image on white, by default nearly square."""
    count, height, width, channels = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    canvas = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, channels), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = (i // columns) * (height + gap) + gap, (i % columns) * (width + gap) + gap
        canvas[top : top + height, left : left + width] = image
    return canvas


def caption_grid(images: Pictures, captions: Sequence[str], columns: int | None = None) -> Sheet:
    """Make a grid of enlarged images, by default nearly square, each with its caption below.

    A caption that is too long ends with "...".
    """
    count, height, width, _ = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    factor = max(1, round(720 / max(rows * (height + 2), columns * (width + 2))))
    font = ImageFont.load_default(CAPTION_SIZE)
    lines = [_wrapped(caption, width * factor, font) for caption in captions]
    below = (CAPTION_SIZE + 3) * max(map(len, lines)) + 3
    gap, cell = 2 * factor, (height * factor + below, width * factor)
    canvas = Image.new("RGB", (columns * (cell[1] + gap) + gap, rows * (cell[0] + gap) + gap), "white")
    pen = ImageDraw.Draw(canvas)
    for i, (image, text) in enumerate(zip(images, lines, strict=True)):
        left, top = (i % columns) * (cell[1] + gap) + gap, (i // columns) * (cell[0] + gap) + gap
        canvas.paste(Image.fromarray(enlarge(image, factor)), (left, top))
        for j, line in enumerate(text):
            pen.text((left, top + height * factor + 2 + j * (CAPTION_SIZE + 3)), line, "black", font)
    return np.asarray(canvas)


def _wrapped(text: str, width: int, font: Any) -> list[str]:
    """Wrap a text into at most CAPTION_LINES lines of at most `width` pixels."""
    lines, line = [], ""
    # Longer texts can't fit, and measuring each beginning of a very long text takes a while.
    for letter in " ".join(text[:500].split()):
        if font.getlength(line + letter) <= width or not line:
            line += letter
            continue
        start, space, rest = line.rpartition(" ")
        whole = letter != " " and bool(space)  # break between words where there is a space
        lines.append(start if whole else line)
        line = (rest if whole else "") + letter
    lines.append(line)
    lines = [line.strip() for line in lines]
    if len(lines) > CAPTION_LINES:
        lines = [*lines[: CAPTION_LINES - 1], lines[CAPTION_LINES - 1][:-3] + "..."]
    return lines


def sample_grid(images: Pictures, columns: int | None = None, captions: Sequence[str] | None = None) -> Sheet:
    """Make a grid of samples, with their captions if there are any, nearly square unless `columns` is given.

    Small images are enlarged until the longer side of the grid has about 720 pixels.
    """
    if captions is not None:
        return caption_grid(images, captions, columns)
    tiled = grid(images, columns)
    return enlarge(tiled, max(1, round(720 / max(tiled.shape[:2]))))


def enlarge(image: Picture, factor: int) -> Picture:
    """Repeat each pixel factor × factor times, which keeps small images visible and exact."""
    return image.repeat(factor, axis=0).repeat(factor, axis=1)
