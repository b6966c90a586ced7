"""Facts about chips from their makers' data sheets (memory, peak dense bfloat16 arithmetic, links), and the compiler
flags that the program sets on its own.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
import platform
import re
from importlib.metadata import version
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from deco_jax.errors import UserError


class Chip(NamedTuple):
    """One device as JAX counts them."""

    name: str
    memory: float  # bytes
    peak: float  # bfloat16 FLOP/s
    links: float  # bytes per second that it can send to other chips, over all of its links together
    clock: float | None = None  # Hz, of the cycles in XLA's cost model for TPUs


GIGA, TERA = 1e9, 1e12
GIB = 2**30

# Pattern of jax.Device.device_kind → chip. For TPUs, the memory is the part that the compiler may use.
# Links are half of the "bidirectional inter-chip interconnect bandwidth (per chip)" of cloud.google.com/tpu/docs/v5e,
# v5p and v6e (400, 1200 and 800 GB/s) and v4's 2400 Gbit/s; half of NVLink's 900 GB/s (H100, H200), 600 GB/s (A100)
# and 400 GB/s (H800, A800) in NVIDIA's. Clocks are those at which the matrix units reach the peak of the data sheet;
# for v5e, 4 units x 128² x 2 FLOP x 1.5 GHz.
CHIPS: tuple[tuple[str, Chip], ...] = (
    (r"TPU v5 ?(lite|e)", Chip("v5e", 15.75 * GIB, 197 * TERA, 200 * GIGA, 1.5 * GIGA)),
    (r"TPU v5p?$", Chip("v5p", 95.74 * GIB, 459 * TERA, 600 * GIGA, 1.75 * GIGA)),
    (r"TPU v6 ?(lite|e)", Chip("v6e", 31.25 * GIB, 918 * TERA, 400 * GIGA, 1.75 * GIGA)),
    (r"TPU v4$", Chip("v4", 32 * GIB, 275 * TERA, 300 * GIGA, 1.05 * GIGA)),
    (r"H200", Chip("H200", 141 * GIGA, 989 * TERA, 450 * GIGA)),
    (r"H800", Chip("H800", 80 * GIGA, 989 * TERA, 200 * GIGA)),  # an H100 with less NVLink
    (r"H100", Chip("H100", 80 * GIGA, 989 * TERA, 450 * GIGA)),
    (r"(A100|A800).*40", Chip("A100-40GB", 40 * GIGA, 312 * TERA, 300 * GIGA)),
    (r"A800", Chip("A800-80GB", 80 * GIGA, 312 * TERA, 200 * GIGA)),
    (r"A100", Chip("A100-80GB", 80 * GIGA, 312 * TERA, 300 * GIGA)),
)


def chip_of(device: jax.Device) -> Chip | None:
    """Return the chip of a device, also of a topology's; None if nothing is known about it, as for a CPU."""
    return next((chip for pattern, chip in CHIPS if re.search(pattern, device.device_kind)), None)


def device_memory(device: jax.Device, mesh: Mesh) -> float | None:
    """Return the bytes that a device can hold; None if unknown, as for a CPU."""
    chip = chip_of(device)
    try:
        stats = device.memory_stats() or {}
    except Exception:  # a device of a topology has no memory to ask about
        stats = {}
    if "bytes_limit" in stats:
        return float(stats["bytes_limit"])
    if chip is None:
        return None
    # A v4 chip shows as two devices, which share its memory.
    places = {
        (getattr(device, "slice_index", 0), *device.coords) for device in mesh.devices.flat if hasattr(device, "coords")
    }
    return chip.memory * (len(places) or mesh.size) / mesh.size


# A library of kernels that these jaxlibs prefer on a CPU. XLA's own kernels are faster, above all for convolutions: on
# two cores with jax 0.10.2 the Inception network does 13 images/s instead of 5 to 7, and a step of
# configs/benchmark_cpu.py takes 0.9 of the time. The library still computes sums, which it does more exactly.
_CPU_KERNELS = "--xla_cpu_experimental_ynn_fusion_type"


def has_cudnn_attention(head_width: int) -> bool:
    """Return whether this machine's GPUs have cuDNN's fused attention for heads of this many channels.

    NVIDIA's have it from Ampere on (compute capability 8.0), and for wide heads from Hopper on (9.0).
    """
    from deco_jax.models import blocks  # only now, for the sake of modes that need no model

    # AMD's name their architecture here.
    capability = re.fullmatch(r"(\d+)\.(\d+)", str(getattr(jax.local_devices()[0], "compute_capability", "")))
    major = int(capability[1]) if capability else 0
    return major >= 8 and blocks.cudnn_takes(head_width, hopper=major >= 9)


def check_attention(model: Any) -> None:
    """Raise UserError if this machine lacks what config.model.attention needs."""
    width = model.width // model.num_heads
    if model.attention == "cudnn" and not has_cudnn_attention(width):
        raise UserError(
            f"config.model.attention=cudnn for heads of {width} channels needs an NVIDIA GPU of compute capability 8.0 "
            f"or more (above 128 channels 9.0), not {jax.local_devices()[0].device_kind}; use auto"
        )


# For NVIDIA's GPUs, after the GPU performance guides of JAX and of NVIDIA's JAX-Toolbox; not measured with this model.
_GPU_FLAGS = {
    # Starts transfers as early and waits for them as late as possible, so that computation hides them.
    "--xla_gpu_enable_latency_hiding_scheduler": "true",
    # Combines small transfers up to this size. XLA's 30 MB would split one block of DeCo-XL, 45 MB in bfloat16.
    "--xla_gpu_all_gather_combine_threshold_bytes": str(2**27),
    "--xla_gpu_reduce_scatter_combine_threshold_bytes": str(2**27),
    "--xla_gpu_all_reduce_combine_threshold_bytes": str(2**27),
}
_KNOWN = (
    "0.10.",
    "0.11.",
    "0.12.",
)  # versions of jaxlib that have all of these: XLA ends the process at an unknown flag


def set_xla_flags() -> None:
    """Add flags to XLA_FLAGS that make programs faster. Call it before the first use of a device.

    These are the flag for CPUs, and those for GPUs if the machine has one; flags that the user has set stay unchanged.
    """
    if not version("jaxlib").startswith(_KNOWN):
        return
    flags = os.environ.get("XLA_FLAGS", "")
    wanted = {_CPU_KERNELS: "reduce", **(_GPU_FLAGS if has_nvidia_gpu() else {})}
    added = [f"{name}={value}" for name, value in wanted.items() if name not in flags]
    os.environ["XLA_FLAGS"] = " ".join([*flags.split(), *added])


def keep_compiled_programs() -> None:
    """Keep compiled programs in the user's cache folder, so that the same command starts in seconds the next time.

    JAX's own settings take precedence: JAX_COMPILATION_CACHE_DIR for another folder, JAX_ENABLE_COMPILATION_CACHE=false
    for no cache.
    """
    if getattr(jax.config, "jax_compilation_cache_dir", None) is not None:
        return
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    # Programs for a CPU use its instruction set, and machines that share a home folder may differ in that.
    features = platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        features += next((line for line in file if line.startswith(("flags", "Features"))), "")
    name = hashlib.sha256(features.encode()).hexdigest()[:12]
    jax.config.update("jax_compilation_cache_dir", os.path.join(root, "deco_jax", "xla", name))


def has_nvidia_gpu() -> bool:
    """Return whether JAX may use an NVIDIA GPU here; doesn't start JAX, which reads XLA_FLAGS when it starts."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    return bool(glob.glob("/dev/nvidia[0-9]*")) and (not platforms or "cuda" in platforms or "gpu" in platforms)
