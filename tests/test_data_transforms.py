"""Decoding and ADM's crop, against a float64 resampler written from the filters' definitions."""

from __future__ import annotations

import io
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from deco_jax.data import comparison
from deco_jax.data.pipeline import read_one
from deco_jax.data.sources import ImageFolder
from deco_jax.data.transforms import center_crop, decode, flip, random_crop

pytestmark = pytest.mark.fast


def box(x):
    return np.where((x > -0.5) & (x <= 0.5), 1.0, 0.0)


def cubic(x, a=-0.5):
    x = np.abs(x)
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def resample(pixels, axis, size, kernel, support):
    """One axis of an antialiased resize, rounded to uint8 as 8-bit images are between the two passes."""
    old = pixels.shape[axis]
    ratio = old / size
    stretch = max(ratio, 1.0)
    weights = np.zeros((size, old))
    for i in range(size):
        middle = (i + 0.5) * ratio
        first = max(int(middle - support * stretch + 0.5), 0)
        last = min(int(middle + support * stretch + 0.5), old)
        w = kernel((np.arange(first, last) - middle + 0.5) / stretch)
        weights[i, first:last] = w / w.sum()
    moved = np.moveaxis(pixels.astype(np.float64), axis, 0)
    return np.clip(np.floor(np.moveaxis(np.tensordot(weights, moved, 1), 0, axis) + 0.5), 0, 255)


def resize(pixels, width, height, kernel, support):
    return resample(resample(pixels, 1, width, kernel, support), 0, height, kernel, support)


# Worked out by hand: (width, height), target (height, width), halvings, covering (width, height), cut at (left, top).
GEOMETRY = [
    ((32, 32), (32, 32), 0, (32, 32), (0, 0)),
    ((101, 67), (32, 32), 1, (48, 32), (8, 0)),  # 50×33, then ·32/33: 48.48×32
    ((67, 101), (32, 32), 1, (32, 48), (0, 8)),
    ((64, 64), (32, 32), 1, (32, 32), (0, 0)),  # twice the target is halved
    ((63, 65), (32, 32), 0, (32, 33), (0, 0)),  # one less is not; 33.02×32
    ((257, 131), (32, 32), 2, (64, 32), (16, 0)),  # 128×65, 64×32
    ((8, 8), (16, 16), 0, (16, 16), (0, 0)),  # upwards too
    ((100, 90), (16, 40), 1, (40, 36), (0, 10)),  # 50×45: stops by the width, then ·40/50
    ((90, 200), (40, 16), 2, (18, 40), (1, 0)),  # 45×100, 22×50, then ·40/50: 17.6×40
    ((33, 47), (24, 8), 0, (17, 24), (4, 0)),  # both sides must be twice: 47 < 48; ·24/47: 16.85
]


@pytest.mark.parametrize("side, target, halvings, covering, cut", GEOMETRY)
def test_crop(side, target, halvings, covering, cut):
    width, height = side
    rows, columns = np.mgrid[:height, :width]
    smooth = 127 + 90 * np.sin(rows / 7)[..., None] * np.cos(columns[..., None] / np.array([5.0, 9.0, 13.0]))
    image = np.clip(smooth + np.random.default_rng(0).normal(0, 25, (height, width, 3)), 0, 255).astype(np.uint8)

    expected = image.astype(np.float64)
    for _ in range(halvings):
        expected = resize(expected, expected.shape[1] // 2, expected.shape[0] // 2, box, 0.5)
    if expected.shape[1::-1] != covering:
        expected = resize(expected, *covering, cubic, 2.0)
    expected = expected[cut[1] : cut[1] + target[0], cut[0] : cut[0] + target[1]]

    actual = center_crop(Image.fromarray(image), target)
    assert actual.shape == (*target, 3)
    assert actual.dtype == np.uint8
    difference = np.abs(actual - expected)
    assert difference.max() <= 2  # PIL rounds between the passes, in an order that depends on the shape
    assert difference.mean() < 0.5


def test_too_elongated_to_cover():
    with pytest.raises(ValueError, match="elongated"):
        center_crop(Image.new("RGB", (4000, 1)), (256, 256))
    with pytest.raises(ValueError, match="elongated for 256×256"):
        random_crop(Image.new("RGB", (4000, 1)), (256, 256), np.random.default_rng(0))


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def palette_picture() -> Image.Image:
    picture = Image.new("P", (16, 16), 1)
    picture.putpalette([0, 0, 0, 200, 100, 50])
    return picture


FORMATS = {
    "jpeg": (encoded(Image.new("RGB", (16, 16), (200, 100, 50)), "JPEG", quality=95), (200, 100, 50)),
    "gray jpeg": (encoded(Image.new("L", (16, 16), 90), "JPEG"), (90, 90, 90)),
    "cmyk jpeg": (encoded(Image.new("CMYK", (16, 16), (55, 155, 205, 0)), "JPEG", quality=95), (200, 100, 50)),
    "png": (encoded(Image.new("RGB", (16, 16), (200, 100, 50)), "PNG"), (200, 100, 50)),
    "palette": (encoded(palette_picture(), "PNG"), (200, 100, 50)),
    "palette, alpha": (encoded(palette_picture(), "PNG", transparency=b"\x00\x80"), (200, 100, 50)),
    "palette, clear colour": (encoded(palette_picture(), "PNG", transparency=1), (200, 100, 50)),
    "rgba": (encoded(Image.new("RGBA", (16, 16), (200, 100, 50, 0)), "PNG"), (200, 100, 50)),
    "rgb, clear colour": (
        encoded(Image.new("RGB", (16, 16), (200, 100, 50)), "PNG", transparency=(200, 100, 50)),
        (200, 100, 50),
    ),
    "gray alpha": (encoded(Image.new("LA", (16, 16), (90, 10)), "PNG"), (90, 90, 90)),
    "one bit": (encoded(Image.new("1", (16, 16), 1), "PNG"), (255, 255, 255)),
    "16 bit": (encoded(Image.fromarray(np.full((16, 16), 128 * 257, np.uint16)), "PNG"), (128, 128, 128)),
    "16 bit white": (encoded(Image.fromarray(np.full((16, 16), 65535, np.uint16)), "PNG"), (255, 255, 255)),
    "webp": (encoded(Image.new("RGB", (16, 16), (200, 100, 50)), "WEBP", lossless=True), (200, 100, 50)),
    "webp alpha": (encoded(Image.new("RGBA", (16, 16), (200, 100, 50, 255)), "WEBP", lossless=True), (200, 100, 50)),
    "gif": (encoded(palette_picture(), "GIF"), (200, 100, 50)),
}


@pytest.mark.parametrize("kind", FORMATS)
def test_formats(kind, tmp_path):
    data, colour = FORMATS[kind]
    (tmp_path / "file").write_bytes(data)
    for image in (decode(data), decode(str(tmp_path / "file"))):
        assert image.mode == "RGB"
        assert np.abs(np.asarray(image).astype(int) - colour).max() <= (3 if "jpeg" in kind else 0)


def test_arrays_and_flip():
    gray = np.arange(12, dtype=np.uint8).reshape(3, 4)
    np.testing.assert_array_equal(np.asarray(decode(gray)), np.stack([gray] * 3, -1))
    colour = np.arange(36, dtype=np.uint8).reshape(3, 4, 3)
    np.testing.assert_array_equal(np.asarray(decode(colour)), colour)
    np.testing.assert_array_equal(flip(colour)[:, 0], colour[:, 3])


def test_orientation_is_left_alone():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(Image.new("RGB", (20, 10)), "JPEG", exif=exif.tobytes())
    assert decode(data).size == (20, 10)


@pytest.mark.parametrize("width, height", [(500, 375), (333, 500), (700, 513), (256, 256)])
def test_the_fast_crop_differs_by_one_level_in_few_pixels(width, height):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))
    exact, fast = (center_crop(picture, (256, 256), fast).astype(int) for fast in (False, True))
    difference = np.abs(exact - fast)
    assert difference.max() <= 1
    assert (difference > 0).mean() < 1e-3


def test_the_comparison_with_torch_prepares_the_same_pixels(tmp_path):
    """Else it would compare two different things."""
    source = ImageFolder(str(jpegs(tmp_path)))
    plain = comparison.Plain(source, (64, 64))
    for index in range(len(source)):
        np.testing.assert_array_equal(plain[index][0], read_one(source, index, (64, 64))["image"])


def jpegs(folder):
    rng = np.random.default_rng(0)
    (folder / "class").mkdir()
    for i, (width, height) in enumerate([(100, 75), (75, 100), (300, 200), (64, 64)]):
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "class" / f"{i}.jpg")
    return folder


def test_a_cores_images(tmp_path):
    source = ImageFolder(str(jpegs(tmp_path)))
    assert comparison.images_per_core_second(source, (64, 64), False) > 0


def test_processor_time_counts_the_processes_that_were_started():
    before = comparison.cpu_seconds()
    busy = "import time; end = time.process_time() + 0.5\nwhile time.process_time() < end: pass\ninput()"
    with subprocess.Popen([sys.executable, "-c", busy], stdin=subprocess.PIPE) as process:
        while comparison.cpu_seconds() - before < 0.4:
            time.sleep(0.05)
        process.communicate(b"\n")
