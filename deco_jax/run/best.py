"""Keeps the best checkpoint, by a score that is measured during training, in addition to the newest ones."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import ml_collections

from deco_jax.errors import UserError
from deco_jax.method.objective import make_method
from deco_jax.run.metrics import read_rows

HIGHER = ("inception_score", "precision", "recall")  # higher is better for these, lower for all others


class Best:
    """The scores of a run's steps, as a preservation policy for Orbax.

    Args:
        config: its train.keep_best is the name of the score.
        of_samples: the names of the scores of samples that are measured during training.

    Raises:
        UserError: that score isn't measured.
    """

    def __init__(self, config: ml_collections.ConfigDict, of_samples: Iterable[str]) -> None:
        name, measured = config.train.keep_best, list(of_samples)
        if config.train.validate_every:
            losses = (f"validation_{loss.name}" for loss in make_method(config).losses if not loss.trained)
            measured += ["validation_loss", *losses]
        if name not in measured:
            known = f"choose from {', '.join(measured)}" if measured else "none is"
            raise UserError(
                f"config.train.keep_best={name} is not measured during training: {known}; set config.evaluate.every "
                "for fid, config.train.validate_every for validation_loss"
            )
        self.name = name
        self._scores: dict[int, float] = {}

    def read(self, workdir: pathlib.Path, last: int) -> None:
        """Read the scores up to a step from metrics.jsonl; later steps will be repeated."""
        rows, _ = read_rows(workdir / "metrics.jsonl")
        self._scores = {row["step"]: row[self.name] for row in rows if row["step"] <= last and self.name in row}
        self._scores = {step: value for step, value in self._scores.items() if value is not None}

    def add(self, step: int, scores: Mapping[str, float], steps: Collection[int]) -> bool:
        """Note the scores of a step; return whether it is the best of `steps`, those with a checkpoint."""
        if self.name not in scores or not math.isfinite(scores[self.name]):
            return False
        self._scores[step] = float(scores[self.name])
        return self.step(steps) == step

    def step(self, steps: Collection[int]) -> int | None:
        """Return the best of some steps, the earliest if there are several; None if none of them has a score."""
        scored = [step for step in sorted(steps) if step in self._scores]
        sign = -1 if self.name in HIGHER else 1
        return min(scored, key=lambda step: sign * self._scores[step], default=None)

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Tell Orbax for each of its checkpoints whether to keep it."""
        best = self.step([checkpoint.step for checkpoint in checkpoints])
        return [checkpoint.step == best for checkpoint in checkpoints]
