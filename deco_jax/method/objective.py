"""The method: everything that a paper varies, as one value, and the objective that follows from it.

uint8 batch ─ to_float ─ x ─┐
                 noise ε ───┼─ path: x_t, v ─ denoiser ─ output ─ prediction: v̂, x̂ ─┬─ each loss of v̂ − v, of x̂, …
         t ~ times ─────────┘     context, dropped ─┘     └ hidden states ──────────┤
uint8 batch ─ frozen networks ─ features ───────────────────────────────────────────┘
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax import Array

from deco_jax.errors import UserError
from deco_jax.method.averages import Average, parse_averages
from deco_jax.method.balance import NAME as BALANCE
from deco_jax.method.balance import Balance
from deco_jax.method.losses import LOSSES
from deco_jax.method.losses.loss import Loss
from deco_jax.method.losses.mean_flow import MeanFlow, MeanStep, make_mean_flow
from deco_jax.method.paths import Path, make_path
from deco_jax.method.predictions import Prediction, make_prediction
from deco_jax.method.step import Draws, Observed, Params, Step
from deco_jax.method.times import LogitNormal, Times
from deco_jax.models.network import FrozenNetwork, Network


@dataclasses.dataclass(frozen=True)
class Method:
    """How a denoiser is trained.

    Attributes:
        path: between noise and data.
        prediction: what the denoiser's output means, on that path.
        times: how training times are drawn.
        losses: the losses whose weighted sum is minimised.
        averages: of the denoiser's weights, by name.
        label_dropout: share of the examples that are trained without their label or caption.
        mean_flow: how jumps are drawn if the mean velocity is learnt; None: the velocity is learnt.
        balance: changes the weight of losses that are `balanced` against the others; None: weights stay.
        noise_scale: standard deviation of the noise.
    """

    path: Path
    prediction: Prediction
    times: Times
    losses: tuple[Loss, ...]
    averages: Mapping[str, Average]
    label_dropout: float
    mean_flow: MeanFlow | None = None
    balance: Balance | None = None
    noise_scale: float = 1.0

    def objective(
        self,
        params: Params,
        pixels: Array,
        draws: Draws,
        observed: Observed,
        frozen: Mapping[str, Params] | None = None,
        measured: Mapping[str, Array] | None = None,
        *,
        networks: Mapping[str, Network],
    ) -> tuple[Array, dict[str, Array]]:
        """Compute the loss of a batch.

        Args:
            params: of each of `networks`.
            pixels: uint8 [batch, height, width, 3].
            frozen: weights of `self.frozen` for losses that apply them; others are ignored.
            measured: the arrays of `self.measured`.
            networks: "denoiser", and `self.trained`.

        Returns:
            The loss, and its unweighted terms by name.
        """
        factor = measured[BALANCE] if measured and self.balance is not None else 1.0
        step = self._step(params, pixels, draws, observed, frozen, measured, networks)
        total, terms = jnp.zeros(len(pixels)), {}
        for loss, term, weight in self._terms(step):
            terms[loss.name] = term
            total = total + (factor if loss.balanced else 1.0) * weight * term
        return jnp.mean(total), {name: jnp.mean(values) for name, values in terms.items()}

    def groups(
        self,
        params: Params,
        pixels: Array,
        draws: Draws,
        observed: Observed,
        frozen: Mapping[str, Params] | None = None,
        measured: Mapping[str, Array] | None = None,
        *,
        networks: Mapping[str, Network],
    ) -> tuple[Array, Array]:
        """Compute the weighted sums of the losses that aren't balanced and of those that are, without the factor."""
        step = self._step(params, pixels, draws, observed, frozen, measured, networks)
        sums = [jnp.zeros(len(pixels))] * 2
        for loss, term, weight in self._terms(step):
            sums[loss.balanced] += weight * term
        return jnp.mean(sums[False]), jnp.mean(sums[True])

    def _terms(self, step: Step) -> Iterator[tuple[Loss, Array, Array | float]]:
        """Yield each loss, its term [batch], and its weight at this step, without the balance's factor."""
        for loss in self.losses:
            term = loss(step) * step.draws.counts.get(loss.name, 1.0)
            yield loss, term, loss.weight * step.draws.shares.get(loss.name, 1.0)

    def _step(
        self,
        params: Params,
        pixels: Array,
        draws: Draws,
        observed: Observed,
        frozen: Mapping[str, Params] | None,
        measured: Mapping[str, Array] | None,
        networks: Mapping[str, Network],
    ) -> Step:
        return (MeanStep if self.mean_flow else Step)(
            params,
            pixels,
            draws,
            observed,
            path=self.path,
            prediction=self.prediction.given(measured or {}),
            networks=networks,
            frozen={name: (network, (frozen or {}).get(name)) for name, network in self.frozen.items()},
            layer=self.layer,
            token=self.token[0] if self.token else None,
        )

    @jax.named_scope("noise")
    def draw(self, key: Array, shape: tuple[int, ...], step: Array | None = None) -> Draws:
        """Draw the random part of a step for image batches of `shape`; depends only on the key, not on devices.

        Args:
            step: steps done, for weights that change over time; None: they have their initial values.
        """
        noise_key, time_key, drop_key = jax.random.split(key, 3)
        jump = None
        if self.mean_flow:
            times, jump = self.mean_flow.draw(time_key, self.times, shape[0])
        else:
            times = self.times(time_key, shape[0])
        return Draws(
            noise=self.noise_scale * jax.random.normal(noise_key, shape),
            times=times,
            dropped=jax.random.bernoulli(drop_key, self.label_dropout, (shape[0],)),
            keys=jax.random.split(jax.random.fold_in(key, 1), shape[0]),
            counts={loss.name: counted(times, loss.min_time) for loss in self.losses if loss.min_time > 0},
            jump=jump,
            token_noise=jax.random.normal(jax.random.fold_in(key, 2), (shape[0], self.token[1]))
            if self.token
            else None,
            shares={}
            if step is None
            else {
                loss.name: jnp.full(shape[0], share_of_weight(loss.schedule, loss.until_step, step))
                for loss in self.losses
                if loss.schedule != "constant"
            },
        )

    def at(self, step: int) -> Method:
        """Return the method without the losses that have ended after this many steps."""
        return dataclasses.replace(
            self, losses=tuple(loss for loss in self.losses if not loss.until_step or step < loss.until_step)
        )

    @property
    def ends(self) -> list[int]:
        """Return the numbers of steps after which a loss is left out, ascending."""
        return sorted({loss.until_step for loss in self.losses if loss.until_step})

    def weighted(self, draws: Draws, weights: Array) -> Draws:
        """Return the same draws, with each example counting `weights` [batch] times as much in every loss."""
        counts = {loss.name: draws.counts.get(loss.name, 1.0) * weights for loss in self.losses}
        return draws._replace(counts=counts)

    def observe(self, frozen: Mapping[str, Params], pixels: Array) -> dict[str, Any]:
        """Compute the features of clean images, uint8 [batch, height, width, 3], that losses need, by network."""
        return {name: self.frozen[name].apply(frozen[name], pixels) for name in self.features}

    @functools.cached_property
    def features(self) -> tuple[str, ...]:
        """The frozen networks whose features of clean images losses need."""
        return tuple(dict.fromkeys(name for loss in self.losses for name in loss.features))

    @functools.cached_property
    def token(self) -> tuple[str, int] | None:
        """The frozen network whose view of the whole image is denoised as one more token, and its channels."""
        return next((loss.token for loss in self.losses if loss.token), None)

    @functools.cached_property
    def trained(self) -> dict[str, Network]:
        """The networks that train along with the denoiser, by name."""
        return {name: network for loss in self.losses for name, network in loss.trained.items()}

    @functools.cached_property
    def frozen(self) -> dict[str, FrozenNetwork]:
        """The networks that aren't trained, by name."""
        return {name: network for loss in reversed(self.losses) for name, network in loss.frozen.items()}

    @property
    def measured(self) -> dict[str, np.ndarray]:
        """The initial values of the arrays that a run measures and stores with its weights, by name."""
        measured = {name: np.zeros(leaf.shape, leaf.dtype) for name, leaf in self.prediction.measured.items()}
        return measured if self.balance is None else measured | {BALANCE: self.balance.first}

    @functools.cached_property
    def layer(self) -> int | None:
        """The number of blocks after which losses need the denoiser's hidden states; None if none does."""
        layers = {loss.layer for loss in self.losses if loss.layer is not None}
        if len(layers) > 1:
            raise UserError(f"the losses align different layers ({', '.join(map(str, sorted(layers)))}); choose one")
        return layers.pop() if layers else None


def counted(times: Array, min_time: float) -> Array:
    """Return how much each example counts, [batch]: equal from a time on, 0 before it; 1 on average if any counts."""
    late = (times >= min_time).astype(jnp.float32)
    return late * len(times) / jnp.maximum(jnp.sum(late), 1)


def share_of_weight(schedule: str, until_step: int, step: Array) -> Array:
    """Return the share of its weight that a loss still has after `step` steps, from 1 down to 0 at `until_step`."""
    done = jnp.clip(step / until_step, 0.0, 1.0)
    return {"linear": 1 - done, "cosine": (1 + jnp.cos(jnp.pi * done)) / 2}[schedule]


def make_method(config: ml_collections.ConfigDict) -> Method:
    """Build the method that a config describes.

    Raises:
        UserError: its settings fit no path, prediction, loss or average.
    """
    loss = config.loss
    found = [make(config) for make in LOSSES]
    return Method(
        path=make_path(config),
        prediction=make_prediction(config),
        times=LogitNormal(loss.time_mean, loss.time_std, loss.time_shift),
        losses=tuple(each for each in found if each is not None),
        averages=parse_averages(config.optimizer.ema_decay, config.optimizer.averages),
        label_dropout=loss.label_dropout,
        mean_flow=make_mean_flow(config),
        balance=Balance(loss.balance_start, loss.balance_every) if loss.balance_start else None,
        noise_scale=config.path.noise_scale,
    )
