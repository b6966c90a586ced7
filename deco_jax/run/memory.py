"""Computes the least memory that a run needs, before anything is allocated.

It is a lower bound: what is refused here can't work, but what passes may still not fit. --mode=compile knows exactly.
"""

from __future__ import annotations

import os
import pathlib

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from deco_jax.errors import UserError
from deco_jax.method.averages import parse_averages
from deco_jax.method.lora import adapter_of
from deco_jax.method.optimizer import make_optimizer
from deco_jax.models import network
from deco_jax.run.hardware import device_memory
from deco_jax.run.sharding import make_mesh

GIB = 2**30
FLOAT32 = 4  # bytes
CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def check_memory(config: ml_collections.ConfigDict, training: bool) -> None:
    """Raise UserError if the model and a batch can't fit in the memory of this machine's devices.

    Args:
        training: true for training, false for drawing images.
    """
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, slices=config.mesh.slices)
    device = jax.local_devices()[0]
    available = device_memory(device, mesh) or host_memory() / len(jax.local_devices())
    fsdp = mesh.shape["fsdp"]
    need = training_bytes(config, mesh.size, fsdp) if training else drawing_bytes(config, mesh.size, fsdp)
    total = sum(need.values())
    if total <= available:
        return
    parts = ", ".join(f"{name} {bytes_ / GIB:,.1f}" for name, bytes_ in need.items())
    smaller = "config.data.batch_size" if training else "config.sample.batch_size"
    raise UserError(
        f"this needs at least {total / GIB:,.1f} GiB on each device ({parts}), but a {device.device_kind} here has "
        f"{available / GIB:,.1f}; make {smaller}, config.data.image_size or the model smaller"
        + (", or raise config.mesh.fsdp or config.optimizer.accumulate_steps" if training else "")
    )


def training_bytes(config: ml_collections.ConfigDict, devices: int, fsdp: int) -> dict[str, float]:
    """Return the bytes per device that a training step needs at least, by purpose."""
    model = config.model
    averages = len(parse_averages(config.optimizer.ema_decay, config.optimizer.get("averages", "")))
    # Weights, gradients, averages; for a low-rank adaptation, the frozen and the merged weights.
    arrays = 2 if adapter_of(config) else 1 + 1 + averages
    moments = 0 if adapter_of(config) else num_moments(config)
    height, width = config.data.image_size
    images = config.data.batch_size / devices
    at_once = images / config.optimizer.accumulate_steps
    pixels, tokens = height * width * 3, (height // model.patch_size) * (width // model.patch_size)
    # Even if everything is recomputed, the backward pass starts from each block's input.
    saved = at_once * tokens * model.width * model.depth * jnp.dtype(model.dtype).itemsize
    return {
        "weights and optimizer": (num_params(config) * arrays + moments) * FLOAT32 / fsdp,
        # The uint8 images; the noise, the state and the output of the part that is worked on.
        "a batch": images * pixels + at_once * pixels * FLOAT32 * 3 + saved,
    }


def drawing_bytes(config: ml_collections.ConfigDict, devices: int, fsdp: int) -> dict[str, float]:
    """Return the bytes per device that drawing a batch needs at least."""
    height, width = config.data.image_size
    states = config.sample.batch_size / devices * height * width * 3 * FLOAT32
    return {"weights": num_params(config) * FLOAT32 / fsdp, "a batch": 2 * states}


def num_params(config: ml_collections.ConfigDict) -> int:
    """Count the denoiser's parameters, from shapes alone."""
    shapes = network.build(config.model.to_dict()).shapes
    return sum(int(np.prod(leaf.shape, dtype=object)) for leaf in jax.tree.leaves(shapes))


def num_moments(config: ml_collections.ConfigDict) -> int:
    """Count the values of the optimizer's state: AdamW has two for each parameter, Muon one for those of matrices."""
    shapes = {"denoiser": network.build(config.model.to_dict()).shapes}
    state = jax.eval_shape(make_optimizer(config.optimizer).init, shapes)
    return sum(int(np.prod(leaf.shape, dtype=object)) for leaf in jax.tree.leaves(state))


def host_memory() -> float:
    """Return the largest memory, in bytes, that this process may use: the host's, or its container's."""
    memory = float(os.sysconf("SC_PAGE_SIZE")) * os.sysconf("SC_PHYS_PAGES")
    for path in map(pathlib.Path, CGROUP_LIMITS):
        if path.is_file() and (limit := path.read_text().strip()).isdigit():
            memory = min(memory, float(limit))
    return memory
