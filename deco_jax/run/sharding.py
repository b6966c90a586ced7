"""The mesh, the axis along which each parameter is split, and programs that each device runs on its own rows.

The mesh has two axes: "data" holds copies of the state, and "fsdp" splits it; the batch is split over both. Slices of a
pod that are joined by a slower network are arranged along "data". Everything that contains a network runs inside
`each_device` (`jax.shard_map`). There, an array of a batch is this device's rows and a parameter is the part that this
device keeps, so nothing can be spread over devices in another way. `gather` makes a parameter whole where it is used;
its derivative adds up the devices' gradients and leaves each device its part. Networks gather for themselves
(`models.network.functional` and `models.layers.run_stack`), because they know the whole shapes of their parameters.
Everything outside (optimizer, averages, noise) is elementwise, and XLA follows the arguments' shardings.
docs/kernels.md says what else was tried.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from deco_jax.errors import UserError
from deco_jax.run.devices import compiling_for, place

AXES = ("data", "fsdp")
BATCH = PartitionSpec(AXES)
WHOLE = PartitionSpec()

# The first rule whose pattern is found in a parameter's path says which dimension is split; None: kept whole. Networks
# have their own rules (`rules`); these are for what all networks share, and for the counters of a state.
RULES: tuple[tuple[str, int | None], ...] = (
    (r"(bias|scale\d?|class_token|null)$", None),
    (r"(^|/)(step|skipped|count|mini_step|gradient_step)$", None),
    (r"^measured/", None),
)


@functools.cache
def rules() -> tuple[tuple[str, int | None], ...]:
    """Return the rules of all networks, then the common ones."""
    # Imported late, because the networks import this module.
    from deco_jax.method import lora
    from deco_jax.models import network, projector, qwen3, vgg, vit

    denoisers = tuple(rule for model in network.MODELS.values() for rule in model.rules)
    return (*denoisers, *lora.rules(denoisers), *projector.RULES, *vit.RULES, *qwen3.RULES, *vgg.RULES, *RULES)


def make_mesh(data: int, fsdp: int, devices: list[jax.Device] | None = None, slices: int = 1) -> Mesh:
    """Make a mesh ("data", "fsdp"); −1 takes all devices that the other axis leaves.

    Args:
        slices: groups of devices with fast links inside, joined by a slower network. `data` and `fsdp` apply to each
            slice; the mesh's "data" axis has slices × data entries, slice by slice. So weights are gathered inside a
            slice, and only sums over "data" cross the network.

    Raises:
        UserError: the machine doesn't have that many devices or slices, or they don't divide evenly.
    """
    devices = jax.devices() if devices is None else devices
    groups = _slices(devices, slices)
    count, of_each = len(groups[0]), " per slice" if slices > 1 else ""
    if data == fsdp == -1:
        raise UserError("config.mesh.data and config.mesh.fsdp are both -1; give one of them a number")
    if data == -1 or fsdp == -1:
        known = fsdp if data == -1 else data
        if count % known:
            raise UserError(f"the mesh axis of {known} does not divide this machine's {count} devices{of_each}")
        data, fsdp = (count // known, fsdp) if data == -1 else (data, count // known)
    if data * fsdp > count:
        raise UserError(
            f"config.mesh asks for {data} x {fsdp} = {data * fsdp} devices{of_each}, but this machine has {count}; "
            "make it smaller, or use -1 for all of them"
        )
    if data * fsdp < count and (jax.process_count() > 1 or slices > 1):
        raise UserError(
            f"config.mesh uses {data * fsdp} of {count} devices{of_each}; with several hosts or slices it must use all"
        )
    # Inside each slice, use the order that suits its links.
    inside = [
        jax.make_mesh((data, fsdp), AXES, axis_types=(AxisType.Auto,) * 2, devices=group[: data * fsdp])
        for group in groups
    ]
    if slices == 1:
        return inside[0]
    return Mesh(np.concatenate([mesh.devices for mesh in inside]), AXES, axis_types=(AxisType.Auto,) * 2)


def _slices(devices: Sequence[jax.Device], slices: int) -> list[list[jax.Device]]:
    """Return the devices of each slice; if devices don't name their slice, equal groups of consecutive processes."""
    found: dict[int, list[jax.Device]] = {}
    for device in devices:
        found.setdefault(getattr(device, "slice_index", None) or 0, []).append(device)
    on_tpu = devices[0].platform == "tpu"
    if len(found) == slices or (slices == 1 and not on_tpu):
        return [found[index] for index in sorted(found)] if slices > 1 else [list(devices)]
    if on_tpu:
        raise UserError(
            f"config.mesh.slices={slices}, but these devices belong to {len(found)} slices; use that number, because "
            "fsdp must not reach across slices"
        )
    if len(devices) % slices:
        raise UserError(f"config.mesh.slices={slices} does not divide the {len(devices)} devices")
    ordered = sorted(devices, key=lambda device: (device.process_index, device.id))
    size = len(devices) // slices
    return [ordered[i : i + size] for i in range(0, len(devices), size)]


# ---------------------------------------------------------------------------------------- inside a device's program


def each_device(function: Callable[..., Any], mesh: Mesh, arguments: Any, results: Any) -> Callable[..., Any]:
    """Return `function` as run by every device on its part of the arguments; call it under `jax.jit`.

    Args:
        arguments: for each argument a PartitionSpec, or a tree of them: BATCH if it has a row for each example, `specs`
            for parameters, WHOLE for the rest.
        results: the same for the results.
    """
    platform = mesh.devices.flat[0].platform if isinstance(mesh, Mesh) else None

    def traced(*parts: Any) -> Any:
        with compiling_for(platform):
            return function(*parts)

    if mesh.size == 1:
        return traced
    # JAX's check of what varies between devices is off: every result is reduced explicitly (`mean_over_devices`,
    # `reduce_gradients`), and models may carry zeros through a scan without declaring on which devices they differ.
    return jax.shard_map(traced, mesh=mesh, in_specs=arguments, out_specs=results, check_vma=False)


def sum_over_devices(values: Any, mesh: Mesh) -> Any:
    """Return the sum of each leaf over all devices of `each_device`."""
    return values if mesh.size == 1 else jax.lax.psum(values, AXES)


def mean_over_devices(values: Any, mesh: Mesh) -> Any:
    """Return the mean of each leaf over all devices of `each_device`."""
    return jax.tree.map(lambda value: value / mesh.size, sum_over_devices(values, mesh))


def share_rows(function: Callable[..., Any], mesh: Mesh, copies: int) -> Callable[..., Any]:
    """Return `function` as computed together by groups of devices that hold the same rows.

    Each of a group's devices computes an equal share of the rows and receives the others'. Where the rows don't divide
    evenly, each computes all of them.

    Args:
        function: (params, *rows) → an array; all have the same leading axis, params are whole on each device.
        copies: how many neighbours in the order of a batch's rows are a group; 1: nothing is shared.
    """
    if copies == 1:
        return function
    groups = [list(range(first, first + copies)) for first in range(0, mesh.size, copies)]

    def of_group(params: Any, *rows: Any) -> Any:
        count = len(jax.tree.leaves(rows)[0])
        if count % copies:
            return function(params, *rows)
        share = count // copies
        first = jax.lax.axis_index(AXES) % copies * share
        own = jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, first, share), rows)
        return jax.lax.all_gather(function(params, *own), AXES, axis_index_groups=groups, tiled=True)

    return of_group


def reduce_gradients(gradients: Any, placed: Any, mesh: Mesh) -> Any:
    """Return the mean over all devices of the gradients of their own rows' losses.

    Args:
        placed: the parameters' `specs`. `gather` has already summed a split parameter's gradient over "fsdp".
    """

    def reduce(gradient: jax.Array, spec: PartitionSpec) -> jax.Array:
        axes = tuple(axis for axis in AXES if axis not in spec and mesh.shape[axis] > 1)
        return (jax.lax.psum(gradient, axes) if axes else gradient) / mesh.size

    return gradients if mesh.size == 1 else jax.tree.map(reduce, gradients, placed)


# ---------------------------------------------------------------------------------------- where arrays lie


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding that splits the leading axis over all devices."""
    return NamedSharding(mesh, BATCH)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def path_name(path: tuple[Any, ...]) -> str:
    """Return a tree path as text, such as "params/denoiser/blocks/norm1/scale"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def state_shardings(mesh: Mesh, state: Any) -> Any:
    """Return a NamedSharding for each leaf of a state (arrays or their shapes) by `rules`.

    The paths of optimizer moments and averages end in the path of their parameter, so the same rules apply.

    Raises:
        UserError: no rule covers a leaf.
    """
    size = mesh.shape["fsdp"]

    def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = path_name(path)
        rule = next((dim for pattern, dim in rules() if re.search(pattern, name)), "none")
        if rule == "none":
            raise UserError(
                f"no sharding rule covers the parameter {name} {leaf.shape}; its network's file in deco_jax/models "
                "must have one (None: kept whole on every device)"
            )
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


def specs(mesh: Mesh, tree: Any) -> Any:
    """Return the PartitionSpec of each leaf by `state_shardings`, for `each_device`."""
    return jax.tree.map(lambda where: where.spec, state_shardings(mesh, tree))


def placed_shapes(mesh: Mesh, shapes: Any) -> Any:
    """Return ShapeDtypeStructs with the shardings of `state_shardings`."""
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
        raise UserError(f"{key}={batch_size} is not divisible by {by}; {nearest} would be")


def host_rank(mesh: Mesh) -> int:
    """Return this host's position in the order of the hosts' rows in a batch, which is its share of the data."""
    rows = batch_sharding(mesh).devices_indices_map((mesh.size,))
    first: dict[int, int] = {}
    for device, (row,) in rows.items():
        host: int = device.process_index  # type: ignore[attr-defined]
        first[host] = min(row.start or 0, first.get(host, mesh.size))
    return sorted(first, key=first.__getitem__).index(jax.process_index())


def place_batch(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """Place this host's rows of a batch on its devices, as arrays of the global batch."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}


def place_everywhere(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """Split a global batch, which every host has in full, over the devices."""
    sharding = batch_sharding(mesh)
    return {name: place(rows, sharding) for name, rows in batch.items()}
