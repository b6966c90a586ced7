"""What several test files share: golden values, the error measure, running the command line."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from deco_jax.convert.mapping import to_torch
from deco_jax.data.pipeline import train_batches
from deco_jax.data.source import Source
from deco_jax.models import vgg

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


def first_batches(count: int, source: Source, **options: Any) -> list[dict]:
    """Of `pipeline.train_batches`, whose workers end with it."""
    batches = train_batches(source, **options)
    try:
        return list(itertools.islice(batches, count))
    finally:
        batches.close()


def fake_devices(count: int) -> dict[str, str]:
    """The environment variable that gives a process this many CPU devices."""
    return {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={count}"}


def run_main(
    *arguments: object, timeout: float = 300, env: dict[str, str] | None = None, prefix: tuple[str, ...] = (), **options
) -> subprocess.CompletedProcess:
    """`python -m deco_jax.main ARGUMENTS` from the repository's root, output captured as text.

    Args:
        prefix: a command that runs the rest as its arguments.
    """
    return subprocess.run(
        [*prefix, sys.executable, "-m", "deco_jax.main", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, **(env or {})},
        **options,
    )


def lpips_params() -> dict[str, Any]:
    """Parameters of `vgg.LPIPS` by the rule of tests/golden/beyond.npz: normal convolutions, uniform linear layers."""
    random = np.random.default_rng(0)
    widths = [3, *(width for group in vgg.GROUPS for width in group)]
    convolutions = {}
    for i, (fan_in, fan_out) in enumerate(itertools.pairwise(widths)):
        kernel = random.normal(0, np.sqrt(2 / (9 * fan_in)), (3, 3, fan_in, fan_out)).astype(np.float32)
        convolutions[i] = {"kernel": kernel, "bias": np.zeros(fan_out, np.float32)}
    linear = {i: random.uniform(0, 1, group[-1]).astype(np.float32) for i, group in enumerate(vgg.GROUPS)}
    return {"convolutions": convolutions, "weights": linear}


def lpips_files(folder: pathlib.Path) -> list[str]:
    """Write `lpips_params` in the layouts that users have; the settings that name the files."""
    params, arguments = lpips_params(), []
    for name, table, part in (("vgg", vgg.vgg_table(), "convolutions"), ("linear", vgg.lpips_table(), "weights")):
        safetensors.numpy.save_file(to_torch(table, {part: params[part]}), folder / f"{name}.safetensors")
        arguments.append(f"--config.lpips.{name}={folder / name}.safetensors")
    return arguments


@contextlib.contextmanager
def browser() -> Iterator[Callable]:
    """A function that opens an address in headless Chromium; at the end, errors on the page and requests to
    anywhere but this machine fail the test. Skips where there is no browser."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright and a Chromium to drive")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("needs a Chromium: apt install chromium")
    troubles: list[str] = []
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])

        def open_page(address: str):
            page = chromium.new_page()
            page.set_default_timeout(30_000)
            page.on("pageerror", lambda error: troubles.append(f"error: {error}"))
            page.on("console", lambda line: troubles.append(line.text) if line.type == "error" else None)
            page.on("request", lambda request: troubles.append(request.url) if not _local(request.url) else None)
            page.goto(address)
            return page

        try:
            yield open_page
        finally:
            chromium.close()
    assert troubles == []


def _local(address: str) -> bool:
    return address.startswith(("file:", "data:", "blob:", "http://127.0.0.1:", "ws://127.0.0.1:"))
