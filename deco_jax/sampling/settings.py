"""How images are drawn, as one value."""

from __future__ import annotations

import dataclasses

import ml_collections
import numpy as np

from deco_jax.data.transforms import image_sides
from deco_jax.errors import UserError
from deco_jax.sampling import samplers
from deco_jax.sampling.guidance import Guidance
from deco_jax.sampling.jumps import TrainedGuidance


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How images are drawn.

    size: (height, width) in pixels.
    num_steps, sampler, shift: the sampler's name in `samplers.SAMPLERS`, and its times as `samplers.timesteps`.
    guidance: a rule with its numbers.
    seed: from 0; its lowest 32 bits count.
    backwards: from images (t = 1) to noise (t = 0).
    """

    size: tuple[int, int]
    num_steps: int
    sampler: str = "euler"
    shift: float = 1.0
    guidance: Guidance = dataclasses.field(default_factory=Guidance)
    seed: int = 0
    backwards: bool = False

    @classmethod
    def of(cls, config: ml_collections.ConfigDict) -> Sampling:
        """What config.sample and config.data.image_size say."""
        settings, (height, width) = config.sample, image_sides(config.data.image_size)
        return cls(
            (height, width),
            settings.num_steps,
            settings.sampler,
            settings.shift,
            (TrainedGuidance if config.model.mean_velocity else Guidance)(
                settings.guidance, tuple(settings.guidance_interval)
            ),
            settings.seed,
        )

    @property
    def times(self) -> np.ndarray:
        """float64 [num_steps + 1], in the order in which they are reached. UserError if there are none such."""
        times = samplers.timesteps(self.num_steps, self.shift)
        return times[::-1] if self.backwards else times

    def table(self) -> samplers.Table:
        """The sampler's coefficients. UserError if there is no such sampler, or it can't go backwards."""
        forwards = samplers.make_table(self.sampler, samplers.timesteps(self.num_steps, self.shift))
        if not self.backwards:
            return forwards
        if np.any(forwards.noise):
            raise UserError(f"the sampler {self.sampler!r} is stochastic and can't go backwards; choose another")
        if np.any(forwards.span):
            raise UserError(f"the sampler {self.sampler!r} jumps towards the image only; choose another")
        return samplers.make_table(self.sampler, self.times)

    def guided(self) -> np.ndarray:
        """Which steps are guided, bool [num_steps]; backwards the same ones as forwards."""
        guided = self.guidance.steps(samplers.timesteps(self.num_steps, self.shift))
        return guided[::-1] if self.backwards else guided

    def num_evaluations(self) -> int:
        """Network evaluations an image takes; a guided one counts two."""
        return samplers.num_evaluations(self.sampler, self.guided())
