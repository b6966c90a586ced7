"""Keeps the best checkpoint, by a score that is measured during training, in addition to the newest ones."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import ml_collections

from deco_jax.errors import UserError
from deco_jax.method.objective import make_method
from deco_jax.run import settings
from deco_jax.run.metrics import read_rows

HIGHER = ("inception_score", "precision", "recall")  # higher is better for these, lower for all others
# Settings besides the guidance's that scores of samples, or the validation loss, depend on.
OF_SAMPLES = (
    *("evaluate.during_training_images", "evaluate.reference", "evaluate.num_reference", "evaluate.inception"),
    *("sample.average", "sample.num_steps", "sample.sampler", "sample.shift", "sample.seed", "data.path"),
)
OF_THE_LOSS = ("data.validation_split", "data.validation_images", "data.batch_size", "sample.average", "data.path")


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
        self._earlier: list[dict[int, float]] = []  # scores that can't be compared with these, nor with each other

    def read(self, workdir: pathlib.Path, last: int, changed: Collection[str] = ()) -> None:
        """Read the scores up to a step from metrics.jsonl; later steps will be repeated.

        Scores from before a change of how they are measured aren't compared with later ones; the best of them is kept.

        Args:
            changed: the settings that differ from that step on; earlier changes are in the history.
        """
        rows, _ = read_rows(workdir / "metrics.jsonl")
        scores = {row["step"]: row[self.name] for row in rows if row["step"] <= last and row.get(self.name) is not None}
        ends = [step for step, names in settings.history(workdir) if step <= last and any(map(self._matters, names))]
        ends += [last] if any(map(self._matters, changed)) else []
        self._earlier, begin = [], 0
        for end in sorted(set(ends)):
            self._earlier.append({step: value for step, value in scores.items() if begin < step <= end})
            begin = end
        self._scores = {step: value for step, value in scores.items() if step > begin}

    def _matters(self, name: str) -> bool:
        """Return whether the score depends on a setting, other than by what is trained."""
        if self.name.startswith("validation"):
            return name.startswith("loss.") or name in OF_THE_LOSS
        return name.startswith("sample.guidance") or name in OF_SAMPLES

    def add(self, step: int, scores: Mapping[str, float], steps: Collection[int]) -> bool:
        """Note the scores of a step; return whether it is the best of `steps`, those with a checkpoint."""
        if self.name not in scores or not math.isfinite(scores[self.name]):
            return False
        self._scores[step] = float(scores[self.name])
        return self.step(steps) == step

    def step(self, steps: Collection[int]) -> int | None:
        """Return the best of some steps, the earliest if there are several; None if none of them has a score."""
        return self._best(self._scores, steps)

    def _best(self, scores: Mapping[int, float], steps: Collection[int]) -> int | None:
        scored = [step for step in sorted(steps) if step in scores]
        sign = -1 if self.name in HIGHER else 1
        return min(scored, key=lambda step: sign * scores[step], default=None)

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Tell Orbax for each of its checkpoints whether to keep it."""
        steps = [checkpoint.step for checkpoint in checkpoints]
        best = {self._best(scores, steps) for scores in (*self._earlier, self._scores)}
        return [step in best for step in steps]
