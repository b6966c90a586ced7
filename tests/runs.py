"""Small finished runs that several test files start from, and what a run leaves, read back."""

from __future__ import annotations

import atexit
import functools
import json
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import jax
import numpy as np
import orbax.checkpoint as ocp

from deco_jax.models import network as network_lib
from deco_jax.run import checkpoint
from tests.helpers import ROOT, run_main

SMOKE = "--config=configs/quickstart.py:smoke"
# Nothing is lost by them in these tests, and each would compile the sampler.
NO_SAMPLES = "--config.train.sample_every=0"


@functools.cache
def _two_steps() -> pathlib.Path:
    workdir = pathlib.Path(tempfile.mkdtemp(prefix="deco_jax_test_"))
    atexit.register(shutil.rmtree, workdir, ignore_errors=True)
    succeed(SMOKE, f"--workdir={workdir}", NO_SAMPLES, "--config.train.num_steps=2", "--config.train.save_every=1")
    return workdir


def two_steps(folder: pathlib.Path) -> pathlib.Path:
    """A copy in `folder` of a run with the checkpoints 1 and 2."""
    return pathlib.Path(shutil.copytree(_two_steps(), folder / "run"))


def succeed(*arguments: object, **options) -> subprocess.CompletedProcess:
    """`run_main`, which has to exit with 0."""
    result = run_main(*arguments, **options)
    assert result.returncode == 0, result.stderr
    return result


def rows(workdir: pathlib.Path) -> dict[int, dict]:
    """metrics.jsonl by step; each step once."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert len({line["step"] for line in lines}) == len(lines)
    return {line["step"]: line for line in lines}


def files(folder: pathlib.Path) -> dict[str, bytes]:
    """Everything under a folder, by relative path."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def steps(workdir: pathlib.Path) -> list[str]:
    """Names in the folder of checkpoints, numbers in their order."""
    return sorted((entry.name for entry in (workdir / "checkpoints").iterdir()), key=lambda name: (len(name), name))


def arrays(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """All arrays of a checkpoint, on whatever devices they were."""
    found: dict[str, np.ndarray] = {}
    with ocp.PyTreeCheckpointer() as reader:
        for item in ("counters", "params", "ema", "optimizer"):
            shapes = reader.metadata(folder / item).item_metadata.tree
            wanted = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes)
            flat, _ = jax.tree_util.tree_flatten_with_path(reader.restore(folder / item, restore_args=wanted))
            found |= {f"{item}{jax.tree_util.keystr(path)}": np.asarray(leaf) for path, leaf in flat}
    return found


def depends_on_time(metric: str) -> bool:
    """Whether a metric says how fast a run was, not what it computed."""
    times = ("images_per_second", "peak_memory_gib", "goodput", "save_blocked_seconds")
    return metric in times or metric.startswith("time_")


def assert_same_run(ours: pathlib.Path, theirs: pathlib.Path, step: int) -> None:
    """The metrics, but for times, and the arrays of a checkpoint are equal to the bit."""
    actual, expected = rows(ours), rows(theirs)
    assert actual.keys() == expected.keys()
    for number in expected:
        for key, value in expected[number].items():
            if not depends_on_time(key):
                assert actual[number][key] == value, f"step {number}: {key}"
    here, there = arrays(ours / "checkpoints" / str(step)), arrays(theirs / "checkpoints" / str(step))
    assert here.keys() == there.keys()
    assert len(there) > 20
    for key in there:
        np.testing.assert_array_equal(here[key], there[key], err_msg=key)


def signal_when(number: int, due: Callable[[str], bool], *arguments: object) -> tuple[int, str]:
    """Start the command, send it a signal once `due` is true of what it has printed; its exit status and output.

    `due` is asked again every few milliseconds, so it may look at files as well.
    """
    with tempfile.TemporaryDirectory() as folder:
        output = pathlib.Path(folder) / "output"
        with output.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "deco_jax.main", *map(str, arguments)], cwd=ROOT, stdout=file, stderr=file
            )
        try:
            end = time.monotonic() + 300
            while not due(output.read_text()):
                assert process.poll() is None, output.read_text()
                assert time.monotonic() < end, output.read_text()
                time.sleep(0.002)
            process.send_signal(number)
            return process.wait(timeout=120), output.read_text()
        finally:
            process.kill()
            process.wait()


def random_checkpoint(workdir, config, averages=("ema",)):
    """Weights that draw something which hangs on the condition, without training them; each average has its own."""
    rng = np.random.default_rng(0)

    def weights(path, leaf):
        return np.asarray((path[-1].key == "scale") + 0.1 * rng.standard_normal(leaf.shape), np.float32)

    params = jax.tree_util.tree_map_with_path(weights, network_lib.build(config.model.to_dict()).shapes)
    if config.model.text_width:
        params["text_embed"]["proj"]["kernel"] *= 10
        params["blocks"]["attention"]["text_kv"]["kernel"] *= 10
    else:
        params["label_embed"]["embedding"] *= 10
    workdir.mkdir(parents=True, exist_ok=True)
    checkpoints = checkpoint.Checkpoints(workdir, 1)
    kept = {name: jax.tree.map(lambda a, i=i: a * np.float32(1 - i / 8), params) for i, name in enumerate(averages)}
    state = {"step": np.int32(1), "skipped": np.int32(0), "params": {"denoiser": params}, "averages": kept}
    checkpoints.save(1, state, config)
    checkpoints.wait()
    checkpoints.close()
    return workdir
