"""What several test files share: golden values, the error measure, running the command line."""

from __future__ import annotations

import functools
import os
import pathlib
import subprocess
import sys

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"


@functools.cache
def golden(name: str) -> dict[str, np.ndarray]:
    """All arrays of tests/golden/NAME.npz; float16 weights come as the float32 the reference used."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        arrays = {key: file[key] for key in file.files}
    return {key: a.astype(np.float32) if a.dtype == np.float16 else a for key, a in arrays.items()}


def golden_params(name: str) -> dict[str, np.ndarray]:
    """The reference's parameters under their PyTorch names."""
    return {key.removeprefix("param/"): a for key, a in golden(name).items() if key.startswith("param/")}


def nhwc(images: np.ndarray) -> np.ndarray:
    """[..., 3, height, width] to [..., height, width, 3]."""
    return np.moveaxis(images, -3, -1)


def relative_error(actual, expected) -> float:
    """max |actual - expected| / max |expected|."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    return float(np.max(np.abs(actual - expected)) / np.max(np.abs(expected)))


def run_main(
    *arguments: object, timeout: float = 300, env: dict[str, str] | None = None, **options
) -> subprocess.CompletedProcess:
    """`python -m deco_jax.main ARGUMENTS` from the repository's root, output captured as text."""
    return subprocess.run(
        [sys.executable, "-m", "deco_jax.main", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, **(env or {})},
        **options,
    )
