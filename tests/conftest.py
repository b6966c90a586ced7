"""Settings for all tests: the CPU, exact float32 products, and JAX's compile cache."""

from __future__ import annotations

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.expanduser("~/.cache/deco_jax_tests"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")

import jax
import pytest


@pytest.fixture(autouse=True)
def exact_products():
    """Golden values were measured in full float32."""
    with jax.default_matmul_precision("highest"):
        yield
