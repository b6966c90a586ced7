"""The protocol of a loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from deco_jax.method.step import Step
from deco_jax.models.network import FrozenNetwork, Network
from deco_jax.shapes import PerExample


class Loss(Protocol):
    """A term of the objective. Subclass it and only override what differs.

    Attributes:
        name: of the unweighted term in the metrics.
        weight: in the objective.
        min_time: time from which examples count; the mean is over those that do, and 0 if none does.
        until_step: number of steps after which the loss is left out, with everything that only it needs; 0: never.
        schedule: the weight until then: "constant", or falling to 0, "linear" or "cosine".
        balanced: whether its weight is multiplied by the factor of `Method.balance`.
        layer: number of blocks after which the loss needs the denoiser's hidden states, as `Step.hidden["aligned"]`;
            None: it needs none.
        trained: networks that train along with the denoiser, by name.
        frozen: networks that aren't trained, by name; losses that give the same name share the network.
        token: the name in `frozen` whose view of the whole image is denoised as one more token, and its channels.
        features: the names in `frozen` whose features of the clean images the loss needs in `Step.features`.
    """

    name: str
    weight: float = 1.0
    min_time: float = 0.0
    until_step: int = 0
    schedule: str = "constant"
    balanced: bool = False
    layer: int | None = None
    trained: Mapping[str, Network] = {}
    frozen: Mapping[str, FrozenNetwork] = {}
    token: tuple[str, int] | None = None
    features: tuple[str, ...] = ()

    def __call__(self, step: Step) -> PerExample:
        """Return the unweighted loss of each example, float32 [batch]."""
        ...

    def comparable(self) -> Loss:
        """Return the loss in a form whose values tell better weights from worse; most losses do as they are."""
        return self
