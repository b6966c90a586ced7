"""What a low-rank adaptation (`method.lora`) starts from: frozen parameters, and those trained ones that are given."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh

from deco_jax.data import imagenet
from deco_jax.errors import UserError
from deco_jax.method.averages import EMA
from deco_jax.method.lora import BASE, adapter_of
from deco_jax.method.objective import make_method
from deco_jax.models import network as network_lib
from deco_jax.models.network import Params
from deco_jax.run import checkpoint as checkpoint_lib
from deco_jax.run import sharding
from deco_jax.run.checkpoint.base import merger
from deco_jax.run.state import State


class Adaptation:
    """A training run's frozen parameters: its own, another adapted run's, or the average of config.init_from.

    Args:
        workdir: of the run.
        checkpoint: of another run, from which a workdir without checkpoints continues; "": none.

    Raises:
        UserError: there is nothing to start from, it belongs to another model, or a loss trains a network of its own.
    """

    base: Params
    started: Params

    def __init__(self, config: ml_collections.ConfigDict, workdir: pathlib.Path, checkpoint: str, mesh: Mesh) -> None:
        self._config, self._mesh = config, mesh
        adapter = adapter_of(config)
        assert adapter is not None
        self.adapter, self._network = adapter, network_lib.build(config.model.to_dict())
        self._merge = merger(adapter, mesh, self._network.shapes)
        adapter.trained_shapes(self._network.shapes)
        if others := ", ".join(make_method(config).trained):
            raise UserError(
                f"config.lora.rank only adapts the denoiser, but a loss trains {others}; set that loss's weight to 0"
            )
        if config.init_optimizer:
            raise UserError(
                "config.init_optimizer takes over the moments of weights that config.lora.rank freezes; set it to False"
            )
        # Frozen weights in a workdir without a checkpoint are from an earlier start, perhaps from other weights.
        self._run: pathlib.Path | None = workdir if checkpoint_lib.complete_steps(workdir) else None
        if self._run is None and checkpoint:
            self._run = checkpoint_lib.find(checkpoint).parent.parent
        self._from: pathlib.Path | None = None
        if self._run is not None or config.lora.random_base:
            return
        if not config.init_from:
            raise UserError(
                "config.lora.rank adapts the weights of config.init_from, which is empty; give a run's folder or a "
                "checkpoint (official files: --mode=import first), or set config.lora.rank=0"
            )
        self._from = checkpoint_lib.find(config.init_from)
        self._like = config.copy_and_resolve_references()
        if (there := checkpoint_lib.num_classes(self._from)) and config.model.num_classes:
            self._like.model.num_classes = there
        checkpoint_lib.find(config.init_from, config=self._like)
        if self._like.model.num_classes != config.model.num_classes and "label_embed" not in adapter.whole:
            raise UserError(
                f"{config.init_from} has {self._like.model.num_classes:,} classes, but config.model.num_classes is "
                f"{config.model.num_classes:,}; add label_embed to config.lora.whole to train a table of your own"
            )

    def load(self, class_names: Sequence[str]) -> dict[str, Params]:
        """Read the frozen parameters for the step, and the pretrained values of parameters that are trained in full.

        Args:
            class_names: of the data, in the order of its labels.
        """
        shapes = self.adapter.base_shapes(self._network.shapes)
        self.started = {}
        if self._run is not None:
            self.base = checkpoint_lib.load_base(self._run, shapes, self._mesh)
        elif self._from is None:
            placed = sharding.state_shardings(self._mesh, {BASE: shapes})[BASE]
            draw = jax.jit(lambda key: self.adapter.base_shapes(self._network.init(key)), out_shardings=placed)
            self.base = draw(jax.random.key(self._config.seed))
        else:
            whole = network_lib.build(self._like.model.to_dict()).shapes
            params = checkpoint_lib.load_average(self._from, whole, self._like, self._mesh, EMA)
            self.base = self.adapter.base_shapes(params)
            self.started = {name: params[name] for name in self.adapter.whole}
            if self._like.model.num_classes != self._config.model.num_classes:
                self.started["label_embed"] = self._labels(params["label_embed"]["embedding"], class_names)
        return {BASE: self.base}

    def begin(self, state: State) -> None:
        """Put the pretrained values of the parameters that are trained in full into a new state, in place."""
        for trained in (state["params"]["denoiser"], *state["averages"].values()):
            trained.update(jax.tree.map(jnp.copy, self.started))

    def merge(self, trained: Params) -> Params:
        """Return the denoiser's parameters."""
        return self._merge(self.base, trained)

    @property
    def note(self) -> str:
        """Return a line on what is trained."""
        size = sum(leaf.size for leaf in jax.tree.leaves(self.base))
        whole = "".join(f" and {name}" for name in self.adapter.whole)
        return f"training factors of rank {self.adapter.rank}{whole}; {size:,} other parameters are frozen"

    def _labels(self, table: jax.Array, names: Sequence[str]) -> dict[str, jax.Array]:
        """Make a table for the run's own classes, [classes + 1, width].

        A class starts from the pretrained class of the same name, or else from "no class".
        """
        assert self._from is not None
        note = self._from.parent.parent / "classes.json"
        there = imagenet.readable(json.loads(note.read_text())) if note.is_file() else []
        rows = [there.index(name) if name in there else -1 for name in imagenet.readable(list(names))]
        shape = jax.ShapeDtypeStruct((len(rows) + 1, *table.shape[1:]), table.dtype)
        placed = sharding.state_shardings(self._mesh, {"label_embed": {"embedding": shape}})["label_embed"]
        return jax.jit(lambda t: {"embedding": t[np.asarray([*rows, -1])]}, out_shardings=placed)(table)
