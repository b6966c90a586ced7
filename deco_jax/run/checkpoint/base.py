"""The frozen parameters of a low-rank adaptation (`method.lora`), stored once for all checkpoints of a run.

WORKDIR/base/{parameters, checksums.json}     beside WORKDIR/checkpoints, whose steps hold what is trained
"""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from deco_jax.errors import UserError, reason
from deco_jax.method.averages import EMA
from deco_jax.method.lora import BASE, Adapter, adapter_of
from deco_jax.models.network import Params
from deco_jax.run import checksums, distributed, orbax_s3, sharding, storage

PARAMETERS = "parameters"


def merger(adapter: Adapter, mesh: Mesh, shapes: Params) -> Callable[[Params, Params], Params]:
    """Return `adapter.merge` on the mesh: (frozen, trained) → parameters of these shapes, sharded by their rules."""
    return jax.jit(adapter.merge, out_shardings=sharding.state_shardings(mesh, shapes))


def save_base(workdir: pathlib.Path, base: Params) -> None:
    """Write the frozen parameters of a new run, whole or not at all; existing ones are replaced.

    Raises:
        UserError: they can't be written.
    """
    folder = storage.absolute(workdir) / BASE
    with _readable(folder, "written", "free space there"):
        distributed.on_main_host(lambda: storage.remove_tree(folder))
        whole = orbax_s3.atomicity() if storage.is_remote(folder) else None
        with ocp.StandardCheckpointer(atomicity_options=whole) as writer:
            writer.save(folder / PARAMETERS, base)
            writer.wait_until_finished()
        # The checksums come last: they mark the folder as complete.
        distributed.on_main_host(lambda: checksums.write(folder))


def has_base(workdir: pathlib.Path) -> bool:
    """Return whether a run has its frozen parameters."""
    return (storage.absolute(workdir) / BASE / checksums.FILE).exists()


def load_base(workdir: pathlib.Path, shapes: Params, mesh: Mesh) -> Params:
    """Load the frozen parameters of a run onto the mesh.

    Args:
        shapes: of the frozen parameters.

    Raises:
        UserError: they are missing or damaged.
    """
    folder = storage.absolute(workdir) / BASE
    if not has_base(workdir):
        raise UserError(
            f"{folder} is missing, which has the frozen weights for the factors in {workdir}; copy a run's whole "
            "folder, not only its checkpoints"
        )
    with _readable(folder, "read", "copy it again"):
        distributed.on_every_host(lambda: checksums.check(folder))
        with ocp.StandardCheckpointer() as reader:
            return reader.restore(folder / PARAMETERS, sharding.placed_shapes(mesh, {BASE: shapes})[BASE])


@contextlib.contextmanager
def _readable(folder: pathlib.Path, what: str, remedy: str) -> Iterator[None]:
    if orbax_s3.stands_for(folder):
        orbax_s3.enable()
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # Orbax and TensorStore raise many kinds
        raise UserError(f"{folder} can't be {what}: {reason(error)}; {remedy}") from error


def read_merged(
    where: pathlib.Path, shapes: Params, stored: Mapping[str, Any], mesh: Mesh, read: Callable[[Params], Params]
) -> Params:
    """Read the parameters of a checkpoint, merging the frozen and the trained ones.

    Args:
        where: the folder of a step of an adapted run.
        shapes: of the whole denoiser.
        stored: the checkpoint's config.
        read: (shapes with shardings of the trained parameters) → the same from the checkpoint.
    """
    adapter = adapter_of(stored)
    assert adapter is not None
    trained = read(sharding.placed_shapes(mesh, {EMA: adapter.trained_shapes(shapes)})[EMA])
    base = load_base(where.parent.parent, adapter.base_shapes(shapes), mesh)
    return merger(adapter, mesh, shapes)(base, trained)
