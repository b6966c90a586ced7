"""DeCo, frequency-decoupled pixel diffusion (arXiv 2511.19365), in JAX.

    import deco_jax

    model = deco_jax.load("runs/quickstart")
    images = model.sample(classes=[3, 3, 7], num_steps=40, seed=0)  # uint8 [3, height, width, 3]

`load` opens a run, a checkpoint, an exported folder or an official .ckpt file; see `Model` for what you can do with it.
A request that can't be fulfilled raises a `UserError` with the remedy. Importing this package starts no device: JAX is
only imported when `load` is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from deco_jax.errors import UserError

if TYPE_CHECKING:
    from deco_jax.api import Model, Snapshot, load

__version__ = "0.1.0"
__all__ = ["Model", "Snapshot", "UserError", "__version__", "load"]


def __getattr__(name: str) -> Any:
    if name in ("Model", "Snapshot", "load"):
        from deco_jax import api

        return getattr(api, name)
    raise AttributeError(f"module 'deco_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
