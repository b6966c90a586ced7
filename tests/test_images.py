"""Pixels and grids against hand-made arrays."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from deco_jax import images

pytestmark = pytest.mark.fast


def test_every_level_survives_the_round_trip():
    levels = np.arange(256, dtype=np.uint8)
    floats = images.to_float(jnp.asarray(levels))
    assert floats.dtype == jnp.float32
    np.testing.assert_allclose(floats, levels.astype(np.float64) / 127.5 - 1, atol=1e-7)
    np.testing.assert_array_equal(images.to_uint8(floats), levels)


def test_out_of_range_is_clipped_and_the_rest_rounded():
    x = jnp.asarray([-7.0, -1.0, -1 + 0.49 / 127.5, -1 + 0.51 / 127.5, 0.0, 1.0, 7.0])
    np.testing.assert_array_equal(images.to_uint8(x), [0, 0, 0, 1, 128, 255, 255])


def test_grid_places_images_row_by_row_on_white():
    tiles = np.stack([np.full((2, 3, 3), 10 * i, np.uint8) for i in range(5)])
    grid = images.grid(tiles, columns=3, gap=1)
    assert grid.shape == (2 * 3 + 1, 3 * 4 + 1, 3)
    expected = np.full(grid.shape, 255, np.uint8)
    for i, (row, column) in enumerate([(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]):
        expected[1 + 3 * row : 3 + 3 * row, 1 + 4 * column : 4 + 4 * column] = 10 * i
    np.testing.assert_array_equal(grid, expected)


def test_columns_of_a_grid_of_samples():
    tiles = np.zeros((20, 4, 4, 3), np.uint8)
    factor = round(720 / (10 * 6 + 2))
    assert images.sample_grid(tiles, 2).shape == (factor * (10 * 6 + 2), factor * (2 * 6 + 2), 3)
    factor = round(720 / (4 * 6 + 2))
    assert images.sample_grid(tiles[:10]).shape == (factor * (3 * 6 + 2), factor * (4 * 6 + 2), 3)


def test_enlarge_repeats_pixels():
    image = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    large = images.enlarge(image, 3)
    assert large.shape == (6, 6, 3)
    for i in range(3):
        for j in range(3):
            np.testing.assert_array_equal(large[i::3, j::3], image)


def test_captions_stand_beneath_their_images():
    """The images in their places, enlarged; ink below each and nowhere else; too long a text is cut."""
    draw = np.random.default_rng(0)
    pictures = draw.integers(0, 200, (3, 16, 24, 3), dtype=np.uint8)
    grid = np.array(images.caption_grid(pictures, ["a cat", "", "many words " * 50]))
    factor = round(720 / (2 * 26))
    gap, height, width = 2 * factor, 16 * factor, 24 * factor
    assert grid.shape[1] == 3 * gap + 2 * width
    below = (grid.shape[0] - 3 * gap) // 2 - height
    ink = []
    for i in range(3):
        top, left = gap + (i // 2) * (height + below + gap), gap + (i % 2) * (width + gap)
        np.testing.assert_array_equal(grid[top : top + height : factor, left : left + width : factor], pictures[i])
        text = grid[top + height : top + height + below, left : left + width]
        ink.append(int((text < 128).sum()))
        grid[top : top + height + below, left : left + width] = 255
    assert (grid == 255).all()
    assert ink[2] > ink[0] > ink[1] == 0
    assert images.sample_grid(pictures, captions=["a", "b", "c"]).shape[1] == 3 * gap + 2 * width
