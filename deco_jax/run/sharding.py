"""The mesh, and which parameter is split along which axis of it.

Two axes: "data" holds copies of the state, "fsdp" splits it; the batch is split over both. XLA inserts the
gathers and reductions that follow from that (GSPMD, arXiv 2105.04663).
"""

from __future__ import annotations

import math
import re
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from deco_jax.errors import UserError

BATCH = PartitionSpec(("data", "fsdp"))

# The first rule whose pattern is found in a parameter's path says which dimension is split; None: kept whole.
# Always the model's width (or a multiple of it), which divides by any sensible number of devices, unlike the
# 1001 labels or the 2730 hidden units.
RULES: tuple[tuple[str, int | None], ...] = (
    (r"decoder/condition/kernel$", -2),
    (r"decoder/blocks/generator/kernel$", -1),
    (r"decoder/", None),  # the pixel decoder's own layers: some kilobytes
    (r"(qkv|text_kv|gate|up|query|key|value)/kernel$", -2),  # [depth, width, ...]
    (r"(attention/out|down|modulation)/kernel$", -1),  # [depth, ..., width]
    (r"(patch_embed|time_embed/\w+|text_embed/proj)/kernel$", -1),
    (r"(label_embed/embedding|encoder/embed/embedding|text_positions)$", -1),
    (r"output/linear/kernel$", -2),
    (r"projector/\w+/kernel$", -2),
    (r"teacher/blocks/mlp_in/kernel$", -2),
    (r"teacher/(blocks/mlp_out/kernel|positions)$", -1),
    (r"(bias|scale\d?|class_token|null)$", None),
    (r"(^|/)(step|skipped|count|mini_step|gradient_step)$", None),
)


def make_mesh(data: int, fsdp: int, devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh ("data", "fsdp"); −1 takes all devices that the other axis leaves.

    Raises:
        UserError: the machine has not that many devices, or they don't divide.
    """
    devices = jax.devices() if devices is None else devices
    count = len(devices)
    if data == fsdp == -1:
        raise UserError("config.mesh.data and config.mesh.fsdp are both -1; give one of them a number")
    if data == -1 or fsdp == -1:
        known = fsdp if data == -1 else data
        if count % known:
            raise UserError(f"the mesh axis of {known} does not divide this machine's {count} devices")
        data, fsdp = (count // known, fsdp) if data == -1 else (data, count // known)
    if data * fsdp > count:
        raise UserError(
            f"config.mesh asks for {data} x {fsdp} = {data * fsdp} devices, this machine has {count}; "
            "make it smaller, or -1 for all that are there"
        )
    if data * fsdp < count and jax.process_count() > 1:
        raise UserError(f"config.mesh uses {data * fsdp} of {count} devices; with several hosts it must use all")
    return jax.make_mesh(
        (data, fsdp), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2, devices=devices[: data * fsdp]
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis split over all devices."""
    return NamedSharding(mesh, BATCH)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def path_name(path: tuple[Any, ...]) -> str:
    """A tree path as "params/denoiser/blocks/norm1/scale"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def state_shardings(mesh: Mesh, state: Any) -> Any:
    """A NamedSharding for each leaf of a state (arrays or their shapes) by RULES; what they don't cover is logged.

    Optimizer moments and averages have their parameter's path at the end of their own, so the same rules hold.
    """
    size = mesh.shape["fsdp"]

    def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = path_name(path)
        rule = next((dim for pattern, dim in RULES if re.search(pattern, name)), "none")
        if rule == "none":
            logging.warning("no sharding rule covers %s %s; every device keeps all of it", name, leaf.shape)
        if not isinstance(rule, int) or size == 1:
            return replicated(mesh)
        if leaf.shape[rule] % size:
            logging.warning(
                "%s %s does not divide over fsdp=%d along axis %d; every device keeps all of it",
                name,
                leaf.shape,
                size,
                rule,
            )
            return replicated(mesh)
        spec: list[str | None] = [None] * leaf.ndim
        spec[rule] = "fsdp"
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree_util.tree_map_with_path(sharding, state)


def placed_shapes(mesh: Mesh, shapes: Any) -> Any:
    """ShapeDtypeStructs with the shardings of `state_shardings`."""
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        shapes,
        state_shardings(mesh, shapes),
    )


def check_batch(mesh: Mesh, batch_size: int, key: str, parts: int = 1) -> None:
    """Raise UserError unless `parts` equal parts of a batch split evenly over the mesh."""
    devices = math.prod(mesh.shape.values())
    if batch_size % (devices * parts):
        by = f"{devices} devices" + (f" x {parts} accumulation steps" if parts > 1 else "")
        nearest = max(1, round(batch_size / (devices * parts))) * devices * parts
        raise UserError(f"{key}={batch_size} does not divide by {by}; {nearest} would")


def host_rank(mesh: Mesh) -> int:
    """This host's place in the order in which the hosts' rows stand in a batch; it reads that share of the data."""
    rows = batch_sharding(mesh).devices_indices_map((mesh.size,))
    first: dict[int, int] = {}
    for device, (row,) in rows.items():
        host: int = device.process_index  # type: ignore[attr-defined]
        first[host] = min(row.start or 0, first.get(host, mesh.size))
    return sorted(first, key=first.__getitem__).index(jax.process_index())


def place_batch(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """This host's rows of a batch onto its devices, as arrays of the global batch."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}


def place_everywhere(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """A global batch that every host has all of, split over the devices."""
    sharding = batch_sharding(mesh)
    return {name: place(rows, sharding) for name, rows in batch.items()}


def place(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """An array that every host has all of, each giving its own devices' parts."""
    return jax.make_array_from_callback(array.shape, sharding, array.__getitem__)
