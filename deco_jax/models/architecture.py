"""What is known of a denoiser: its module, settings, FLOPs, sharding rules and official names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from deco_jax.convert.mapping import Row

# (pattern, the dimension that is split along "fsdp"; None: kept whole); see `run.sharding`.
Rules = tuple[tuple[str, int | None], ...]


class Architecture(NamedTuple):
    """All that is known of a denoiser; registered by a line in `models.network`.

    module: called with the entries of config.model but `name` and `prediction`, and rngs
    settings: the dataclass of its section of the config
    flops: (config.model, height, width) → multiply-adds of a forward pass on one image, by part
    rules: how its parameters are split; the first whose pattern is found in a parameter's path
    table: (config.model) → the rows of its official checkpoints
    output: the path of the last layer's matrix among the parameters
    fixed: (config.model, height, width) → the tensors of official checkpoints that follow from the sizes
    ignored: names of tensors that official checkpoints may have and that aren't read
    """

    module: Callable[..., nnx.Module]
    settings: type
    flops: Callable[[Mapping[str, Any], int, int], dict[str, float]]
    rules: Rules
    table: Callable[[Mapping[str, Any]], list[Row]]
    output: str = "output/linear/kernel"
    fixed: Callable[[Mapping[str, Any], int, int], dict[str, np.ndarray]] = lambda model, height, width: {}
    ignored: tuple[str, ...] = ()
