"""Learns the mean velocity of the rest of the path, so that one step draws an image (MeanFlow in pixels).

The network gets the length h of a jump and predicts u(x_t, t, h), the mean of the velocity over [t, t + h]. It follows
from the definition that u − h·du/dt = v, where the derivative is along the path and comes from a forward-mode product:

    x_t, t, h ─ network ──────────────────── u ─┐
              └ its JVP along (v̂, 1, −1) ─ du/dt ┴─ u − h·du/dt, compared with v
                  v̂: a second head's, at h = 0    └ guided: v + (1 − 1/ω)(v̂_class − v̂_none) within an interval

Guidance is trained in: scale ω and interval are inputs of the network. Times here are 0 for noise and 1 for data, so
the signs are those of −s in the source. Sources: MeanFlow (Geng et al. 2025); pixel MeanFlow (pMF).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from jax import Array

from deco_jax.method.losses.loss import Loss
from deco_jax.method.paths import per_example
from deco_jax.method.step import Step
from deco_jax.method.times import Times
from deco_jax.schema import above, at_least, between, setting
from deco_jax.shapes import Images, PerExample

# Columns of the network's input, [batch, 4]; see `models.jumps.JumpEmbedding`.
LENGTH, GUIDANCE, LOW, HIGH = range(4)


@dataclasses.dataclass(frozen=True)
class MeanFlowSettings:
    """The settings of MeanFlow."""

    mean_flow: bool = setting(
        False, "Learn the mean velocity, for samples in one or two steps; needs model.mean_velocity."
    )
    mean_flow_equal: float = setting(
        0.5, "Share of the examples with a jump of length 0, which is flow matching.", between(0, 1)
    )
    mean_flow_guidance: float = setting(
        8.0, "Largest guidance scale that the model learns; 1: none.", at_least(1, 1000)
    )
    mean_flow_power: float = setting(
        1.0,
        "Power of (error + mean_flow_offset) by which squared errors are divided; 0: off; 1: losses stay near 1.",
        between(0, 1),
    )
    mean_flow_offset: float = setting(0.01, "See mean_flow_power.", above(0, 1e9))


@dataclasses.dataclass(frozen=True)
class MeanFlow:
    """How times and jumps are drawn.

    equal: share of the examples with a jump of length 0.
    max_guidance: scales are log-uniform from 1 to this.
    """

    equal: float = 0.5
    max_guidance: float = 8.0

    def draw(self, key: Array, times: Times, batch: int) -> tuple[Array, Array]:
        """Draw times [batch], and [batch, 4]: the jump's length, the guidance scale and its interval (low, high].

        Both ends of a jump are distributed like `times`. Examples with a jump of length 0 are at its beginning.
        """
        keys = jax.random.split(key, 5)
        ends = [times(each, batch) for each in keys[:2]]
        start, end = jnp.minimum(*ends), jnp.maximum(*ends)
        # Evenly spread over the batch. Mixed data sources alternate along it, so a fixed first place could give one of
        # them all jumps of length 0.
        first = jax.random.randint(jax.random.fold_in(key, len(keys)), (), 0, batch)
        place = jnp.arange(batch, dtype=jnp.float32) + first
        still = jnp.floor((place + 1) * self.equal) > jnp.floor(place * self.equal)
        length = jnp.where(still, 0.0, end - start)
        scale = self.max_guidance ** jax.random.uniform(keys[2], (batch,))
        low = jax.random.uniform(keys[3], (batch,), maxval=0.5)
        high = jax.random.uniform(keys[4], (batch,), minval=0.5)
        return start, jnp.stack([length, scale, low, high], axis=1)


def instantaneous(mean: Images, derivative: Images, length: PerExample) -> Images:
    """Return the velocity at the beginning of jumps, u − h·du/dt (MeanFlow, eq. 6, with time reversed).

    Args:
        mean: u, [batch, height, width, 3].
        derivative: of u with respect to t, along the path and with the jump's end fixed.
        length: of the jumps, [batch].
    """
    return mean - per_example(length, mean) * derivative


def along_path(
    mean: Callable[[Images, PerExample, Array], Images], state: Images, times: PerExample, jump: Array, velocity: Images
) -> Images:
    """Return du/dt along the path with the jump's end fixed, by one forward-mode product.

    Args:
        mean: u, a function of the state [batch, height, width, 3], times [batch] and jump [batch, 4].
        velocity: of the path at the state.
    """
    ahead = jnp.zeros_like(jump).at[:, LENGTH].set(-1.0)
    return jax.jvp(mean, (state, times, jump), (velocity.astype(state.dtype), jnp.ones_like(times), ahead))[1]


def guided_velocity(
    velocity: Images, conditional: Images, unconditional: Images, scale: PerExample, inside: Array
) -> Images:
    """Return v + (1 − 1/ω)(v̂_class − v̂_none) where `inside`, else v; a network that learns this learns guidance.

    Args:
        velocity: the path's.
        conditional, unconditional: the network's own, of the same shape.
        scale: ω of each example, at least 1; inside: bool [batch].
    """
    share = jnp.where(inside, 1 - 1 / scale, 0.0)
    return velocity + per_example(share, velocity) * (conditional - unconditional)


def adaptive(error: Images, power: float, offset: float) -> PerExample:
    """Return S / (S + offset)^power, without a gradient of the denominator; S is an example's sum of squared errors."""
    squares = jnp.sum(jnp.square(error.astype(jnp.float32)), axis=(1, 2, 3))
    return squares / jax.lax.stop_gradient(squares + offset) ** power


class MeanStep(Step):
    """A step whose `velocity` is the mean velocity, and whose `error` is that of the velocity implied by it."""

    @property
    def jump(self) -> Array:
        """The network's input about the jump and guidance, [batch, 4]."""
        assert self.draws.jump is not None
        return self.draws.jump

    @functools.cached_property
    def _denoised(self) -> tuple[Array, dict[str, Array]]:
        inputs = (self.point.state, self.times, self.context, self._layer, self.draws.keys)
        return self.trained("denoiser", *inputs, jump=self.jump)

    def _heads(self, state: Images, times: Array, context: Array, jump: Array, keys: Any = None) -> tuple[Array, Array]:
        """Return mean and instantaneous velocity with the current weights, without a gradient to them."""
        params = jax.lax.stop_gradient(self.params["denoiser"])
        mean, more = self._networks["denoiser"].apply(params, state, times, context, None, keys, jump=jump)
        mean, velocity = (self._prediction.velocity(output, state, times) for output in (mean, more["velocity"]))
        return mean, velocity

    @functools.cached_property
    def own_velocities(self) -> tuple[Images, Images]:
        """The network's instantaneous velocities with the example's condition and with none."""
        still = self.jump.at[:, LENGTH].set(0.0)
        null = jnp.broadcast_to(self.null, self.context.shape).astype(self.context.dtype)
        twice = [jnp.concatenate([a, a]) for a in (self.point.state, self.times)]
        both = [jnp.concatenate(pair) for pair in ((self.context, null), (still, still))]
        _, velocity = self._heads(*twice, *both)
        conditional, unconditional = jnp.split(velocity, 2)
        return conditional, unconditional

    @functools.cached_property
    def target(self) -> Images:
        """The velocity to learn: the path's, guided away from the network's velocity without a condition."""
        velocity = self._prediction.target(self.images, self.point, self.times)
        inside = (self.jump[:, LOW] < self.times) & (self.times <= self.jump[:, HIGH])
        target = guided_velocity(velocity, *self.own_velocities, self.jump[:, GUIDANCE], inside)
        return jax.lax.stop_gradient(target)

    @functools.cached_property
    def derivative(self) -> Images:
        """du/dt along the path with the jump's end fixed."""
        # Separate from the pass that is differentiated: this costs a forward pass and saves that pass the tangents'
        # memory.

        def mean(state: Images, times: Array, jump: Array) -> Images:
            return self._heads(state, times, self.context, jump, self.draws.keys)[0]

        derivative = along_path(mean, self.point.state, self.times, self.jump, self.own_velocities[0])
        return jax.lax.stop_gradient(derivative)

    @functools.cached_property
    def error(self) -> Array:
        return instantaneous(self.velocity, self.derivative, self.jump[:, LENGTH]) - self.target

    @functools.cached_property
    def head_error(self) -> Array:
        """The error of the second head, float32 [batch, height, width, 3]."""
        velocity = self._prediction.velocity(self.hidden["velocity"], self.point.state, self.times)
        return velocity - self.target


@dataclasses.dataclass(frozen=True)
class MeanVelocityLoss(Loss):
    """Flow matching of the velocity that the mean velocity implies."""

    name = "mean_velocity"
    weight: float = 1.0
    power: float = 1.0
    offset: float = 0.01

    def __call__(self, step: Step) -> PerExample:
        return step.error_weight * adaptive(step.error, self.power, self.offset)

    def comparable(self) -> MeanVelocityLoss:
        """Return the sum of squared errors: divided by itself, it is nearly constant."""
        return dataclasses.replace(self, power=0.0)


@dataclasses.dataclass(frozen=True)
class VelocityHeadLoss(Loss):
    """Flow matching of the second head."""

    name = "velocity_head"
    weight: float = 1.0
    power: float = 1.0
    offset: float = 0.01

    def __call__(self, step: Step) -> PerExample:
        assert isinstance(step, MeanStep)
        return step.error_weight * adaptive(step.head_error, self.power, self.offset)

    def comparable(self) -> VelocityHeadLoss:
        """Return the sum of squared errors: divided by itself, it is nearly constant."""
        return dataclasses.replace(self, power=0.0)


def mean_from_config(config: ml_collections.ConfigDict) -> MeanVelocityLoss | None:
    """Build the loss of the first head; None without config.loss.mean_flow."""
    loss = config.loss
    return MeanVelocityLoss(1.0, loss.mean_flow_power, loss.mean_flow_offset) if loss.mean_flow else None


def head_from_config(config: ml_collections.ConfigDict) -> VelocityHeadLoss | None:
    """Build the loss of the second head; None without config.loss.mean_flow."""
    loss = config.loss
    return VelocityHeadLoss(1.0, loss.mean_flow_power, loss.mean_flow_offset) if loss.mean_flow else None


def make_mean_flow(config: ml_collections.ConfigDict) -> MeanFlow | None:
    """Build the jumps of config.loss.mean_flow; None if it is off."""
    loss = config.loss
    return MeanFlow(loss.mean_flow_equal, loss.mean_flow_guidance) if loss.mean_flow else None
