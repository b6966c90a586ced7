"""The best checkpoint by a score that is measured while training: it is kept beside the newest ones."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import ml_collections

from deco_jax.errors import UserError
from deco_jax.method.objective import make_method
from deco_jax.run.metrics import read_rows

HIGHER = ("inception_score", "precision", "recall")  # of these more is better, of all others less


class Best:
    """Knows the scores of a run's steps; one of Orbax's preservation policies.

    Args:
        config: whose train.keep_best is the name of the score.
        of_samples: the names of the scores of samples that are measured while training.

    Raises:
        UserError: it isn't measured.
    """

    def __init__(self, config: ml_collections.ConfigDict, of_samples: Iterable[str]) -> None:
        name, measured = config.train.keep_best, list(of_samples)
        if config.train.validate_every:
            losses = (f"validation_{loss.name}" for loss in make_method(config).losses if not loss.trained)
            measured += ["validation_loss", *losses]
        if name not in measured:
            known = f"choose from {', '.join(measured)}" if measured else "none is"
            raise UserError(
                f"config.train.keep_best={name} is not measured while training: {known}; set config.evaluate.every for "
                "fid, config.train.validate_every for validation_loss"
            )
        self.name = name
        self._scores: dict[int, float] = {}

    def read(self, workdir: pathlib.Path, last: int) -> None:
        """Read the scores up to a step from metrics.jsonl; later steps are done again."""
        rows, _ = read_rows(workdir / "metrics.jsonl")
        self._scores = {row["step"]: row[self.name] for row in rows if row["step"] <= last and self.name in row}
        self._scores = {step: value for step, value in self._scores.items() if value is not None}

    def add(self, step: int, scores: Mapping[str, float], steps: Collection[int]) -> bool:
        """Note the scores of a step; whether it is the best of `steps`, those with a checkpoint."""
        if self.name not in scores or not math.isfinite(scores[self.name]):
            return False
        self._scores[step] = float(scores[self.name])
        return self.step(steps) == step

    def step(self, steps: Collection[int]) -> int | None:
        """The best of some steps, the earliest if several are; None if none of them has a score."""
        scored = [step for step in sorted(steps) if step in self._scores]
        sign = -1 if self.name in HIGHER else 1
        return min(scored, key=lambda step: sign * self._scores[step], default=None)

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Answer Orbax for each of its checkpoints."""
        best = self.step([checkpoint.step for checkpoint in checkpoints])
        return [checkpoint.step == best for checkpoint in checkpoints]
