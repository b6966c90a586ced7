"""Weights & Biases: shows a run's metrics, grids and scores there, too.

WORKDIR/wandb.json has the run's id, so a resumed run stays one run there. Values have their training step as "step",
the x axis of all plots, because wandb's own count can't go back to the step from which a run resumes. wandb decides
where and whether anything is sent: WANDB_MODE=offline keeps it in WORKDIR/wandb, for `wandb sync`.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging

from deco_jax.errors import UserError
from deco_jax.run import files, storage

FILE = "wandb.json"
FOLDER = "wandb"


def check(project: str) -> None:
    """Make sure that a run can be tracked, before anything else is done.

    Raises:
        UserError: the package is missing, or it has no API key to log in with.
    """
    wandb = _package(project)
    if os.environ.get("WANDB_MODE", "online") != "online":
        return
    try:
        wandb.login()  # asks on a terminal
    except Exception as error:
        raise _refused(error) from error


class Tracker:
    """A run at Weights & Biases, until `close`; a context manager.

    An error after the start never ends the training: it is reported once, and the rest is left out.

    Args:
        project: of W&B.
        folder: the workdir, which gives the run its name and stores its id.
        config: plain values to show with the run; values of an earlier start stay unless these replace them.
        job: W&B's job type of the run.

    Raises:
        UserError: wandb can't start a run.
    """

    def __init__(self, project: str, folder: pathlib.Path, config: Mapping[str, Any], job: str = "") -> None:
        wandb = _package(project)
        self._wandb, self._broken = wandb, False
        self._remote = folder / FOLDER if storage.is_remote(folder) else None
        self._cleanup = contextlib.ExitStack()
        local = folder
        if self._remote is not None:
            local = pathlib.Path(self._cleanup.enter_context(storage.temporary()))
        try:
            self._run = wandb.init(
                project=project,
                id=_run_id(folder),
                resume="allow",
                name=folder.name,
                dir=str(local),
                config=dict(config),
                job_type=job or None,
                settings=wandb.Settings(console="off", silent=True),
            )
            self._run.define_metric("*", step_metric="step")
        except Exception as error:
            self._cleanup.close()
            raise _refused(error) from error
        self._local = local / FOLDER
        offline = self._run.settings.mode == "offline"
        self.where = f"offline, in {folder / FOLDER}" if offline else str(self._run.url)

    def log(self, step: int, values: Mapping[str, float | None]) -> None:
        """Add values to a step; non-finite ones are None, and left out."""
        known = {name: value for name, value in values.items() if value is not None}
        self._try(lambda: self._run.log({"step": step, **known}))

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """Add an image, uint8 [height, width, 3]."""
        self._try(lambda: self._run.log({"step": step, name: self._wandb.Image(image)}))

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Add a table of texts and numbers; None is an empty cell."""
        data = [list(row) for row in rows]
        self._try(lambda: self._run.log({name: self._wandb.Table(list(columns), data, allow_mixed_types=True)}))

    def summary(self, values: Mapping[str, float]) -> None:
        """Set the values that summarise the run in W&B's table of runs."""
        self._try(lambda: self._run.summary.update(dict(values)))

    def sync(self) -> None:
        """Upload what an offline run has written so far, if the workdir is in a bucket."""
        remote = self._remote
        if remote is None or self._run.settings.mode != "offline":
            return
        for path in sorted(self._local.rglob("*")):
            if path.is_file() and not path.is_symlink():
                storage.put(remote / path.relative_to(self._local), path.read_bytes())

    def close(self) -> None:
        self._try(self._run.finish)
        if self._remote is not None:
            self._try(self._wandb.teardown)  # its service may still be writing the file's end
        self.sync()
        self._cleanup.close()

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _try(self, action: Callable[[], Any]) -> None:
        if self._broken:
            return
        try:
            action()
        except Exception as error:  # wandb and its service raise many kinds
            self._broken = True
            logging.error("Weights & Biases gets no more of this run (%s); metrics.jsonl has all of it", error)


def _run_id(folder: pathlib.Path) -> str:
    """Return the id of a workdir's run; create it the first time."""
    path = folder / FILE
    with contextlib.suppress(FileNotFoundError, ValueError, KeyError, TypeError):
        return str(json.loads(path.read_text())["id"])
    made = uuid.uuid4().hex[:12]
    with files.whole(path) as part:
        part.write_text(json.dumps({"id": made}) + "\n")
    return made


def _package(project: str) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise UserError(
            f'config.train.wandb={project} needs Weights & Biases: pip install "deco_jax[wandb]" ({error})'
        ) from error
    return wandb


def _refused(error: Exception) -> UserError:
    line = " ".join(str(error).split())[:300]
    return UserError(
        f"Weights & Biases can't be used: {line}; run `wandb login`, set WANDB_API_KEY, keep the run here with "
        "WANDB_MODE=offline, or leave config.train.wandb empty"
    )
