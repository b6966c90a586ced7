"""What the program decides on its own: config.model.remat=auto and config.model.attention=auto."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from deco_jax.models import blocks
from deco_jax.run import distributed, hardware, monitor, program

AUTO = "auto"
# From the policy that computes least to the one that needs the least memory; names in `models.layers.REMAT_POLICIES`.
CHEAPEST_FIRST = ("none", "dots", "attention", "full")
# Share of a GPU's memory; the compiler doesn't count the workspaces of cuDNN and cuBLAS, nor gaps between arrays.
GPU_SHARE = 0.92


def attention(name: str, dtype: DTypeLike, head_width: int, platform: str | None = None) -> str:
    """Return the implementation that "auto" stands for; other names are returned unchanged.

    It is cuDNN's fused attention in bfloat16 on NVIDIA GPUs that have it, if it supports the head width, `models.flash`
    on TPUs if it supports the sizes, and XLA's attention elsewhere.

    Args:
        head_width: channels of a head.
        platform: "gpu" (any that has the fused attention), "tpu" or "cpu"; None: this machine's.
    """
    if name != AUTO:
        return name
    here, platform = platform is None, platform or jax.default_backend()
    if platform == "tpu":
        return "flash"
    fused = platform == "gpu" and jnp.dtype(dtype) == jnp.bfloat16 and blocks.cudnn_takes(head_width)
    return "cudnn" if fused and not (here and not hardware.has_cudnn_attention(head_width)) else "xla"


class Refused(NamedTuple):
    """The compiler's answer to a program that doesn't fit."""

    message: str
    peak: float | None  # bytes that it would need, if it says so


def compile_or_refused(program: jax.stages.Lowered) -> jax.stages.Compiled | Refused:
    """Compile a program; the TPU compiler refuses one that doesn't fit in the chip's memory."""
    try:
        return program.compile()
    except Exception as error:
        if "RESOURCE_EXHAUSTED" not in str(error) and "memory" not in str(error).lower():
            raise
        used = re.search(r"Used ([\d.]+)([KMG]) of", str(error))
        peak = float(used[1]) * {"K": 2**10, "M": 2**20, "G": 2**30}[used[2]] if used else None
        return Refused(str(error)[:500], peak)


class Remat(NamedTuple):
    """A rematerialisation policy that was chosen."""

    name: str
    compiled: jax.stages.Compiled | None  # the step with it, if it had to be compiled for this
    note: str  # in words, why


def remat(
    compile_with: Callable[[str], jax.stages.Compiled | Refused], memory: float | None, platform: str | None = None
) -> Remat:
    """Return the fastest policy whose compiled program fits in a device's memory on all hosts.

    If XLA estimates a program's cycles, as it does for TPUs, every policy is compiled and the fewest cycles win,
    because recomputing is often faster there than reading from memory. Otherwise the first one that fits is chosen.

    Args:
        compile_with: (policy) → the training step, compiled with it.
        memory: bytes per device; None, as for a CPU: nothing is compiled, and every activation is kept.
    """
    if memory is None:
        return Remat("none", None, "remat none: this device doesn't report its memory")
    usable = memory * (GPU_SHARE if (platform or jax.default_backend()) == "gpu" else 1.0)
    tried: list[str] = []
    found: list[tuple[int | None, str, jax.stages.Compiled]] = []  # that fit
    for name in CHEAPEST_FIRST:
        compiled = compile_with(name)
        cycles = None
        if isinstance(compiled, Refused):
            peak, fits = compiled.peak, False
        else:
            peak, cycles = float(monitor.program_bytes(compiled)["peak"]), estimated_cycles(compiled)
            fits = peak <= usable
        needs = "does not compile" if peak is None else f"needs {peak / 2**30:.2f}"
        tried.append(f"{name} {needs}" + (f" at {cycles:.3g} cycles" if cycles else ""))
        if distributed.all_hosts(fits) and not isinstance(compiled, Refused):
            found.append((cycles, name, compiled))
            if cycles is None:
                break
    if not found:
        note = f"remat {name}, too large according to the compiler: of {usable / 2**30:.2f} GiB per device"
        return Remat(name, None if isinstance(compiled, Refused) else compiled, f"{note}, {', '.join(tried)}")
    _, name, compiled = min(found, key=lambda each: each[0] or 0)
    return Remat(name, compiled, f"remat {name}: of {usable / 2**30:.2f} GiB per device, {', '.join(tried)}")


def estimated_cycles(compiled: jax.stages.Compiled) -> int | None:
    """Return the cycles that XLA's model of the chip expects, the same on every host; None if it gives no estimate."""
    return sum(cost.total for cost in program.costs(program.parse(compiled.as_text() or ""))) or None


def policies(memory: float | None) -> Iterator[str]:
    """Yield the policies to try, in order, for a machine with this many bytes per device."""
    yield from CHEAPEST_FIRST if memory is not None else CHEAPEST_FIRST[:1]
