"""The periodic actions of training: log, save, evaluate, draw a grid.

An action is called after a step and decides itself at which steps it is due. `TrainingRun` is what actions share.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import jax
import ml_collections
import numpy as np
from absl import logging
from jax.sharding import Mesh

from deco_jax import images, interrupts
from deco_jax.conditioning.condition import Condition
from deco_jax.conditioning.requests import Requests, grid_columns
from deco_jax.data import pipeline
from deco_jax.errors import UserError
from deco_jax.evaluation.evaluator import Subject
from deco_jax.method.optimizer import learning_rate, updates_done
from deco_jax.method.training import COMPILER, PRIOR, Batch, Metrics
from deco_jax.run import checkpoint, distributed, monitor, sharding
from deco_jax.run.best import Best
from deco_jax.run.goodput import Goodput
from deco_jax.run.local_copies import LocalCopies
from deco_jax.run.state import State
from deco_jax.run.writer import Writer
from deco_jax.sampling import generate
from deco_jax.sampling.settings import Sampling
from deco_jax.sampling.weaker import Guide


@dataclasses.dataclass(frozen=True)
class TrainingRun:
    """What the actions of a training run share.

    folder: the workdir.
    frozen: arrays that aren't trained, by name, on the mesh.
    merge: turns the trained part of a low-rank adaptation into the denoiser's parameters.
    best: keeps the checkpoint with the best score.
    """

    config: ml_collections.ConfigDict
    folder: pathlib.Path
    mesh: Mesh
    condition: Condition
    frozen: dict[str, Any]
    checkpoints: checkpoint.Checkpoints
    writer: Writer
    goodput: Goodput
    guide: Guide
    merge: Callable[[Any], Any] | None = None
    best: Best | None = None

    def at(self, step: int, every: int, last: bool = False) -> bool:
        """Return whether a step is a multiple of `every` (0: none is), or, with `last`, the last of the training."""
        return bool(every) and (step % every == 0 or (last and step == self.config.train.num_steps))

    def averaged(self, state: State) -> Any:
        """Return the averaged weights that draw images; those of an adaptation are merged with the frozen ones."""
        average = state["averages"][self.config.sample.average]
        return average if self.merge is None else self.merge(average)

    def subject(self, state: State) -> Subject:
        """Return the averaged weights as a subject without samples."""
        return Subject(None, self.averaged(state), self.frozen | {"measured": state.get("measured", {})})

    def sampling(self, state: State) -> Sampling:
        """Return how images are drawn, including the weaker model that guidance leads away from, if there is one."""
        averages, merge = state["averages"], self.merge
        return self.guide(Sampling.of(self.config), lambda name: merge(averages[name]) if merge else averages[name])


class Action(Protocol):
    """Something to do every so many steps.

    Attributes:
        hurried: also done when the run was asked to stop; a stop doesn't wait for the other actions.
        spends: the name in the goodput of the time that the devices wait for it.
    """

    hurried: bool
    spends: str

    def due(self, step: int, stopping: bool) -> bool:
        """Return whether to do it after a step; `stopping`: it is the last step before the run stops."""
        ...

    def __call__(self, step: int, state: State) -> bool | None:
        """Do it, with the state after the step; return False if it was postponed."""
        ...


class Reader:
    """Reads batches onto the mesh, and counts the images that could not be read so far."""

    def __init__(self, run: TrainingRun, batches: pipeline.Batches) -> None:
        self._run, self._batches = run, batches
        self._before = int(run.writer.last.get("unreadable_images", 0))
        self._here = self._ahead = 0  # in this host's batches so far, and in the one it has read ahead

    def __call__(self) -> Batch:
        """Read the next batch."""
        batch = next(self._batches)
        self._ahead = len(batch["unreadable"])
        names = ("image", *self._run.condition.inputs, *([PRIOR] if PRIOR in batch else []))
        return sharding.place_batch(self._run.mesh, {name: batch[name] for name in names})

    def used(self) -> None:
        """Note that the last batch was trained on, so that its unreadable images count."""
        self._here += self._ahead
        self._ahead = 0

    def unreadable(self) -> int:
        """Count the images that could not be read, on all hosts, since the run began."""
        return self._before + distributed.sum_of_hosts(self._here)


class Log:
    """Writes lines of metrics, and stops a run that diverges. `add` takes metrics that are still on the device."""

    hurried = True
    spends = "logging"

    def __init__(self, run: TrainingRun, unreadable: Callable[[], int]) -> None:
        self._run, self._unreadable = run, unreadable
        self._rate = learning_rate(run.config.optimizer)
        self._pending: list[Metrics] = []
        self._since = time.monotonic()
        self.blocked = 0.0  # seconds for which the longest save since the last line held up the steps

    def add(self, metrics: Metrics) -> None:
        self._pending.append(metrics)

    def restart_clock(self) -> None:
        """Don't count the time since the last step as part of the next one."""
        self._since = time.monotonic()

    def due(self, step: int, stopping: bool) -> bool:
        return self._run.at(step, self._run.config.train.log_every, last=True)

    def __call__(self, step: int, state: State) -> None:
        history = self.check(step)
        seconds = time.monotonic() - self._since
        values = {name: float(value) for name, value in history[-1].items() if name != "skipped"}
        memory = monitor.peak_memory()
        if memory is not None:
            values["peak_memory_gib"] = memory / 2**30
        values["learning_rate"] = float(self._rate(max(0, int(updates_done(state["opt_state"])) - 1)))
        values["images_per_second"] = self._run.config.data.batch_size * len(history) / seconds
        values |= self._run.goodput.shares()
        if self.blocked:
            values["save_blocked_seconds"], self.blocked = self.blocked, 0.0
        self._run.writer.write(step, {**values, "unreadable_images": self._unreadable()})

    def check(self, step: int) -> list[dict[str, np.ndarray]]:
        """Wait for the steps since the last check; raise UserError if too many of them were not finite."""
        history = jax.device_get(self._pending)
        self._pending = []
        check_finite(history, step, self._run.config.train.max_skipped_steps, self._run.checkpoints)
        return history


class Save:
    """Writes a checkpoint of a state that is known to be good.

    Steps only wait while the state is copied to the host; it is written in the background. If the previous checkpoint
    is still being written after config.train.save_wait seconds, this one is postponed to the next line of metrics.
    Milestones and the save at a stop or at the end wait as long as they have to.
    """

    hurried = True
    spends = "saving"

    def __init__(self, run: TrainingRun, log: Log) -> None:
        self._run, self._log = run, log
        self._postponed = self._must = False
        self._scored = (run.config.evaluate.every, run.config.train.validate_every) if run.best else ()

    def due(self, step: int, stopping: bool) -> bool:
        train = self._run.config.train
        self._must = stopping or step == train.num_steps or self._run.at(step, train.keep_every)
        self._must = self._must or any(self._run.at(step, every) for every in self._scored)  # it may be the best
        again = self._postponed and self._run.at(step, train.log_every)
        return self._must or again or self._run.at(step, train.save_every)

    def __call__(self, step: int, state: State) -> bool:
        run = self._run
        self._log.check(step)
        began = time.monotonic()
        if not self._must and not run.checkpoints.free(run.config.train.save_wait):
            if not self._postponed:
                logging.warning("step %d: the last checkpoint is still being written; this one is postponed", step)
            self._postponed = True
            return False
        self._postponed = False
        run.writer.sync()
        run.checkpoints.save(step, state, run.config)
        self._log.blocked = max(self._log.blocked, time.monotonic() - began)
        run.goodput.note(step)
        return True


class CopyLocally:
    """Copies the state to each host's own disk."""

    hurried = False
    spends = "saving"

    def __init__(self, run: TrainingRun, log: Log, copies: LocalCopies) -> None:
        self._run, self._log, self._copies = run, log, copies

    def due(self, step: int, stopping: bool) -> bool:
        return self._run.at(step, self._run.config.train.local_copies_every)

    def __call__(self, step: int, state: State) -> None:
        self._log.check(step)
        began = time.monotonic()
        self._copies.save(step, state)
        self._log.blocked = max(self._log.blocked, time.monotonic() - began)


class Evaluate:
    """Adds scores of the averaged weights to the step's line of metrics.

    Args:
        every: steps.
        scores: (state) → scores by name.
    """

    hurried = False
    spends = "evaluation"

    def __init__(self, run: TrainingRun, every: int, scores: Callable[[State], Mapping[str, float]]) -> None:
        self._run, self._every, self._scores = run, every, scores

    def due(self, step: int, stopping: bool) -> bool:
        return self._run.at(step, self._every)

    def __call__(self, step: int, state: State) -> None:
        run = self._run
        # There, measuring images may print lines of its own.
        quiet = contextlib.redirect_stdout(sys.stderr) if run.config.train.log_json else contextlib.nullcontext()
        with quiet:
            scores = self._scores(state)
        for name, value in scores.items():
            run.writer.add(step, name, value)
        if run.best and run.best.add(step, scores, {*run.checkpoints.steps(), step}):
            run.writer.say(f"step {step} is the best so far by {run.best.name}; its checkpoint is kept")


class Grid:
    """Draws a grid of samples."""

    hurried = False
    spends = "grids"

    def __init__(self, run: TrainingRun, generator: generate.Generator, requests: Requests) -> None:
        self._run, self._generator, self._requests = run, generator, requests

    def due(self, step: int, stopping: bool) -> bool:
        return self._run.at(step, self._run.config.train.sample_every, last=True)

    def __call__(self, step: int, state: State) -> None:
        run, path = self._run, self._run.folder / "samples" / f"step_{step:08d}.png"
        grid = sample_grid(self._generator, run.averaged(state), self._requests, run.config, run.sampling(state))
        run.writer.write_image(step, "samples", grid, path)
        run.writer.say(f"wrote {path}")


def sample_grid(
    generator: generate.Generator,
    params: Any,
    requests: Requests,
    config: ml_collections.ConfigDict,
    sampling: Sampling,
) -> np.ndarray:
    """Draw samples, in class order or with their captions, as one uint8 image."""
    samples = generator.images(params, requests, sampling, config.sample.batch_size)
    columns = grid_columns(config.sample, requests.labels)
    return images.sample_grid(np.concatenate(list(samples)), columns, requests.names)


def check_finite(
    history: list[dict[str, np.ndarray]], last_step: int, allowed: int, checkpoints: checkpoint.Checkpoints
) -> None:
    """Log the skipped steps of `history`; raise UserError if more than `allowed` in a row were skipped."""
    for step, metrics in enumerate(history, start=last_step - len(history) + 1):
        skipped = int(metrics["skipped"])
        if not skipped:
            continue
        parts = ", ".join(f"{name} {float(value):.4g}" for name, value in metrics.items() if name != "skipped")
        if skipped > allowed:
            checkpoints.wait()
            kept = checkpoints.steps()
            last = f"the checkpoint of step {kept[-1]} is good" if kept else "there is no checkpoint yet"
            raise UserError(
                f"step {step}: the loss or its gradient is not finite ({parts}), for {skipped} step(s) in a row, "
                f"config.train.max_skipped_steps={allowed}; {last}: resume from it with a lower learning rate, "
                "config.optimizer.clip_norm, or float32"
            )
        logging.warning("step %d skipped: the loss or its gradient is not finite (%s)", step, parts)


class FirstTime:
    """Marks the compilations in an action's first call as expected; later ones aren't."""

    def __init__(self, compilations: monitor.CompileWatch) -> None:
        self._compilations, self._done = compilations, set[int]()

    @contextlib.contextmanager
    def __call__(self, action: Action) -> Iterator[None]:
        if id(action) in self._done:
            yield
            return
        with self._compilations.expected(), interrupts.waits_for(f"{COMPILER}, and for what it compiles"):
            yield
        self._done.add(id(action))
