"""Train with a loss of one's own, without touching the package.

    python examples/own_loss.py --workdir runs/edges           # the quickstart's model, three minutes on two cores
    python examples/own_loss.py --workdir /tmp/edges --smoke   # seconds

The loss compares the edges of the predicted clean image with those of the true one. Its name is a column of
metrics.jsonl; what else a loss may ask for (hidden states, frozen networks, networks that train along) is described in
`deco_jax.method.losses.loss.Loss`.
"""

from __future__ import annotations

import argparse
import dataclasses

import jax
import jax.numpy as jnp

from configs import quickstart
from deco_jax.method.losses import LOSSES
from deco_jax.method.losses.loss import Loss
from deco_jax.method.step import Step
from deco_jax.programs.train import train


@dataclasses.dataclass(frozen=True)
class EdgeLoss(Loss):
    """Mean absolute error of the differences between neighbouring pixels."""

    name = "edges"
    weight: float = 0.1

    def __call__(self, step: Step) -> jax.Array:
        error = step.image - step.images  # x̂ − x, [batch, height, width, 3]
        down, right = jnp.diff(error, axis=1), jnp.diff(error, axis=2)
        return jnp.mean(jnp.abs(down), axis=(1, 2, 3)) + jnp.mean(jnp.abs(right), axis=(1, 2, 3))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--smoke", action="store_true", help="the same program, tiny")
    arguments = parser.parse_args()
    LOSSES.append(lambda config: EdgeLoss())  # every run of this process
    train(quickstart.get_config("smoke" if arguments.smoke else "digits"), arguments.workdir)


if __name__ == "__main__":
    main()
