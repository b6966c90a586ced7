"""What a loss is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from deco_jax.method.step import Step
from deco_jax.models.network import FrozenNetwork, Network
from deco_jax.shapes import PerExample


class Loss(Protocol):
    """A term of the objective. Subclass it and say only what differs.

    Attributes:
        name: of the unweighted term in the metrics.
        weight: in the objective.
        min_time: time from which examples count; the mean is over those that do, and 0 where none does.
        until_step: steps after which it is left out, and whatever only it needs is not computed; 0: never.
        schedule: how the weight goes on until then: "constant", or falling to 0, "linear" or "cosine".
        balanced: whether its weight is multiplied by the factor of `Method.balance`.
        layer: blocks after which the denoiser's hidden states are wanted, as `Step.hidden["aligned"]`; None: they
            aren't.
        trained: networks that train along with the denoiser, by name.
        frozen: networks that don't train, by name; losses that name the same share it.
        token: of `frozen`, the one whose view of the whole image is denoised as one more token, and its channels.
        features: those of `frozen` whose features of the clean images are wanted in `Step.features`.
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
