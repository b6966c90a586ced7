"""How images are drawn, as one value."""

from __future__ import annotations

import dataclasses

import ml_collections
import numpy as np

from deco_jax.data.transforms import image_sides
from deco_jax.errors import UserError
from deco_jax.sampling import samplers
from deco_jax.sampling.guidance import RULES, Guidance
from deco_jax.sampling.jumps import TrainedGuidance


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How images are drawn.

    size: (height, width) in pixels.
    num_steps, sampler, shift: the sampler's name in `samplers.SAMPLERS`, and its times as `samplers.timesteps`.
    guidance: a rule with its numbers.
    seed: from 0; its lowest 32 bits count.
    backwards: from images (t = 1) to noise (t = 0).
    noise_scale: standard deviation of the noise.
    """

    size: tuple[int, int]
    num_steps: int
    sampler: str = "euler"
    shift: float = 1.0
    guidance: Guidance = dataclasses.field(default_factory=Guidance)
    seed: int = 0
    backwards: bool = False
    noise_scale: float = 1.0

    @classmethod
    def of(cls, config: ml_collections.ConfigDict) -> Sampling:
        """What config.sample and config.data.image_size say."""
        settings, (height, width) = config.sample, image_sides(config.data.image_size)
        return cls(
            (height, width),
            settings.num_steps,
            settings.sampler,
            settings.shift,
            TrainedGuidance(settings.guidance, tuple(settings.guidance_interval))
            if config.model.mean_velocity
            else make_rule(settings),
            settings.seed,
            noise_scale=config.path.noise_scale,
        )

    @property
    def times(self) -> np.ndarray:
        """float64 [num_steps + 1], in the order in which they are reached. UserError if there are none such."""
        times = samplers.timesteps(self.num_steps, self.shift)
        return times[::-1] if self.backwards else times

    def table(self) -> samplers.Table:
        """The sampler's coefficients. UserError if there is no such sampler, or it can't go backwards."""
        times, waits = samplers.timesteps(self.num_steps, self.shift), self.guidance.waits
        if waits >= self.num_steps:
            raise UserError(f"the first {waits} steps of the guidance wait, of {self.num_steps}; draw in more steps")
        forwards = samplers.after_waiting(samplers.make_table(self.sampler, times[waits:]), waits)
        if not self.backwards:
            return forwards
        if waits:
            raise UserError("guidance whose first steps wait can't go backwards; choose another rule")
        if np.any(forwards.noise):
            raise UserError(f"the sampler {self.sampler!r} is stochastic and can't go backwards; choose another")
        if np.any(forwards.span):
            raise UserError(f"the sampler {self.sampler!r} jumps towards the image only; choose another")
        return samplers.make_table(self.sampler, self.times)

    def guided(self, table: samplers.Table) -> np.ndarray:
        """Which evaluations of the `table` are guided, bool; backwards the same steps as forwards."""
        starts = samplers.timesteps(self.num_steps, self.shift)[:-1]
        return self.guidance.evaluations(table.time, table.step, starts[::-1] if self.backwards else starts)

    def num_evaluations(self) -> int:
        """Network evaluations an image takes; a guided one counts two."""
        table = self.table()
        return int(np.sum(1 + self.guided(table)))


def make_rule(settings: ml_collections.ConfigDict) -> Guidance:
    """What config.sample says of guidance, without the weaker model that it may name (`weaker.with_weaker`)."""
    more = {"zero_steps": settings.guidance_zero_steps} if settings.guidance_rule == "zero_star" else {}
    return RULES[settings.guidance_rule](
        settings.guidance,
        tuple(settings.guidance_interval),
        rescale=settings.guidance_rescale,
        by_evaluation=settings.guidance_times == "evaluation",
        **more,
    )
