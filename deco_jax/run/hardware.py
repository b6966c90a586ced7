"""What is known of chips: memory and peak arithmetic, by the makers' data sheets (dense bfloat16, no sparsity), and
the one compiler flag that was measured to help.
"""

from __future__ import annotations

import os
import re
from importlib.metadata import version
from typing import NamedTuple

import jax

from deco_jax.errors import UserError


class Chip(NamedTuple):
    """One device as JAX counts them."""

    name: str
    memory: float  # bytes
    peak: float  # bfloat16 FLOP/s


GIGA, TERA = 1e9, 1e12
GIB = 2**30

# Pattern of jax.Device.device_kind → chip. TPU memory is what the compiler may use of it.
CHIPS: tuple[tuple[str, Chip], ...] = (
    (r"TPU v5 ?(lite|e)", Chip("v5e", 15.75 * GIB, 197 * TERA)),
    (r"TPU v5p?$", Chip("v5p", 95.74 * GIB, 459 * TERA)),
    (r"TPU v6 ?(lite|e)", Chip("v6e", 31.25 * GIB, 918 * TERA)),
    (r"TPU v4$", Chip("v4", 32 * GIB, 275 * TERA)),
    (r"H200", Chip("H200", 141 * GIGA, 989 * TERA)),
    (r"(H100|H800)", Chip("H100", 80 * GIGA, 989 * TERA)),
    (r"(A100|A800).*40", Chip("A100-40GB", 40 * GIGA, 312 * TERA)),
    (r"(A100|A800)", Chip("A100-80GB", 80 * GIGA, 312 * TERA)),
)


def chip_of(device: jax.Device) -> Chip | None:
    """The chip of a device (a topology's too); None where nothing is known, such as a CPU."""
    return next((chip for pattern, chip in CHIPS if re.search(pattern, device.device_kind)), None)


# A library of kernels that these jaxlibs prefer on a CPU. XLA's own are quicker, convolutions above all: on two cores
# with jax 0.10.2 the Inception network does 13 images/s, not 5 to 7, and a step of configs/benchmark_cpu.py takes 0.9
# of the time. The library keeps the sums, which it does in more exact steps.
_CPU_KERNELS = "--xla_cpu_experimental_ynn_fusion_type"
_CPU_KERNELS_KNOWN = ("0.10.", "0.11.", "0.12.")  # XLA ends the process at a flag that it doesn't know


def check_attention(attention: str) -> None:
    """UserError if this machine has not what config.model.attention needs."""
    if attention == "cudnn" and jax.default_backend() != "gpu":
        raise UserError(f"config.model.attention=cudnn needs an NVIDIA GPU, not a {jax.default_backend()}; use xla")


def set_xla_flags() -> None:
    """Adds to XLA_FLAGS what makes a CPU quicker, unless it is set there; only before the first use of a device."""
    flags = os.environ.get("XLA_FLAGS", "")
    if _CPU_KERNELS not in flags and version("jaxlib").startswith(_CPU_KERNELS_KNOWN):
        os.environ["XLA_FLAGS"] = f"{flags} {_CPU_KERNELS}=reduce".strip()
