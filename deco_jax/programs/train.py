"""The training program: set-up, loop, and what happens every so many steps."""

from __future__ import annotations

import contextlib
import json
import pathlib
import time
from typing import Any

import jax
import ml_collections
import numpy as np
import optax
from absl import logging
from jax.sharding import Mesh

from deco_jax import images
from deco_jax.conditioning.condition import Condition, open_condition
from deco_jax.conditioning.requests import Prompts, Requests, open_prompts, sampling_requests
from deco_jax.data import imagenet, pipeline, sources
from deco_jax.data.transforms import image_sides
from deco_jax.errors import UserError
from deco_jax.method.averages import EMA
from deco_jax.method.objective import make_method
from deco_jax.method.optimizer import make_optimizer
from deco_jax.method.training import Batch, Metrics, Observer, choose_remat, lower_train_step, make_networks
from deco_jax.models.network import Network
from deco_jax.programs.evaluate import QuickFID
from deco_jax.run import checkpoint, distributed, monitor, preemption, settings, sharding, storage
from deco_jax.run.state import State, create_state, state_shapes
from deco_jax.run.workdir import make_workdir
from deco_jax.run.writer import Writer, write_json, write_overview
from deco_jax.sampling import generate

CLASSES = "classes.json"  # their names in the order of the labels


def train(config: ml_collections.ConfigDict, workdir: str, checkpoint_path: str = "") -> None:
    """Train to config.train.num_steps, from the newest checkpoint in the workdir if there is one.

    Args:
        checkpoint_path: of another run, which a workdir without checkpoints goes on from: step, weights, moments.
    """
    folder = storage.path(workdir)

    # Everything that can be wrong is found before anything compiles or is written.
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
    sharding.check_batch(mesh, config.data.batch_size, "config.data.batch_size", config.optimizer.accumulate_steps)
    with distributed.stage("listing the images"):
        source = sources.open_source(config.data)
        distributed.check_same_data(source)
    prompts = open_prompts(config) if config.train.sample_every else None
    condition = open_condition(config, mesh, source)
    if config.init_from and checkpoint_path:
        raise UserError(
            "--checkpoint goes on with a run and config.init_from begins one with its weights; give one of them"
        )
    if (config.init_from or checkpoint_path) and not checkpoint.complete_steps(folder):
        checkpoint.check_projector(checkpoint.find(checkpoint_path or config.init_from, config=config), config)
    changed = {}
    if checkpoint.complete_steps(folder):
        settings.check_kept(folder, config)
        changed = settings.changes(folder, config)
    check_same_classes(folder, source.class_names)
    quick_fid = QuickFID(config, folder, mesh) if config.evaluate.every else None
    settled, remat = choose_remat(config, mesh, condition)
    networks, observe, frozen = make_networks(settled, mesh, condition)
    optimizer = make_optimizer(config.optimizer)
    averages = make_method(config).averages
    if config.sample.average not in averages:
        raise UserError(
            f"config.sample.average={config.sample.average!r} is not an average that this run keeps; choose from "
            f"{', '.join(averages)}, or add it to config.optimizer.averages"
        )
    shapes = state_shapes(networks, optimizer, mesh, averages)
    requests = grid_requests(config, condition, frozen, prompts) if config.train.sample_every else None
    for written in (folder, *([storage.path(config.evaluate.cache)] if quick_fid and config.evaluate.cache else [])):
        make_workdir(written)

    checkpoints = checkpoint.Checkpoints(folder, config.train.keep_checkpoints)
    with distributed.stage("reading the newest checkpoint"):
        state = checkpoints.restore(shapes, config)
        if state is None and checkpoint_path:
            state = checkpoint.load_state(checkpoint.find(checkpoint_path), shapes, config)
    resumed = state is not None
    if state is None:
        with distributed.stage("creating the state"):
            state = create_state(config.seed, networks, optimizer, mesh, averages)
            if config.init_from:
                state = start_from(config, state, mesh)
    start = int(state["step"])
    checkpoints.set_aside_after(start)
    main_host = jax.process_index() == 0
    if main_host and (start < config.train.num_steps or not (folder / "config.json").exists()):
        settings.record(folder, config, start)
    if main_host:
        write_json(folder / CLASSES, imagenet.readable(source.class_names))
        write_overview(folder / "parameters.txt", state["params"])
    writer = Writer(folder, config.train.num_steps, resumed_at=start, active=main_host)
    writer.say(
        f"{config.model.name} with {networks['denoiser'].num_params:,} parameters on "
        f"{mesh.size} {jax.devices()[0].platform} device(s); {len(source):,} images "
        + (f"of {source.num_classes} classes; " if source.num_classes else "with captions; ")
        + (f"resumed at step {start}" if resumed else "a new run")
    )
    for line in (settings.said(changed), source.notes(), remat.note if remat else ""):
        if line:
            writer.say(line)
    if start >= config.train.num_steps:
        writer.say(f"already trained to step {start}; raise config.train.num_steps to go on")
        writer.close()
        checkpoints.close()
        return

    batches = open_batches(config, mesh, source, condition, start)
    try:
        # From here on, compiling included, a signal asks to save and stop.
        with preemption.Watch() as watch:
            run(
                config,
                folder,
                mesh,
                networks,
                optimizer,
                condition,
                observe,
                frozen,
                state,
                batches,
                checkpoints,
                writer,
                watch,
                requests,
                quick_fid,
                remat.compiled if remat else None,
            )
    finally:
        batches.close()
        writer.close()
        checkpoints.close()


def check_same_classes(folder: pathlib.Path, names: list[str]) -> None:
    """UserError if a run that goes on would take its labels for other classes than it was trained on so far."""
    path = folder / CLASSES
    if not path.exists() or not checkpoint.complete_steps(folder):
        return
    before, names = imagenet.readable(json.loads(path.read_text())), imagenet.readable(names)
    changed = [f"{i} was {a!r} and is {b!r}" for i, (a, b) in enumerate(zip(before, names, strict=False)) if a != b]
    if before != names:
        what = changed[0] if changed else f"there were {len(before):,} and are {len(names):,}"
        raise UserError(
            f"{folder} was trained on other classes: {what}; give it its data, or another --workdir with "
            f"--config.init_from; if only the names changed, remove {path}"
        )


def run(
    config: ml_collections.ConfigDict,
    folder: pathlib.Path,
    mesh: Mesh,
    networks: dict[str, Network],
    optimizer: optax.GradientTransformation,
    condition: Condition,
    observe: Observer,
    frozen: dict[str, Any],
    state: State,
    batches: pipeline.Batches,
    checkpoints: checkpoint.Checkpoints,
    writer: Writer,
    watch: preemption.Watch,
    requests: Requests | None,
    quick_fid: QuickFID | None = None,
    compiled: jax.stages.Compiled | None = None,
) -> None:
    """The loop of `train`, with everything made; `compiled` is the training step, if it is compiled already."""
    start, total = int(state["step"]), config.train.num_steps
    generator = generate.make_generator(networks["denoiser"], config, mesh)
    unreadable = unreadable_ahead = 0  # in this host's batches so far, and in the one it has read ahead
    unreadable_before = int(writer.last.get("unreadable_images", 0))

    def read() -> Batch:
        nonlocal unreadable_ahead
        batch = next(batches)
        unreadable_ahead = len(batch["unreadable"])
        return sharding.place_batch(mesh, {name: batch[name] for name in ("image", *condition.inputs)})

    with distributed.stage("reading the first batch"):
        placed = read()
    if compiled is None:
        writer.say("compiling the training step ...")
        began = time.monotonic()
        # Compiled once, for these shapes: another shape or sharding later is an error, not a silent recompilation.
        with distributed.stage("compiling the training step"):
            compiled = lower_train_step(networks, optimizer, config, observe, mesh, state, placed, frozen).compile()
        writer.say(f"compiled in {time.monotonic() - began:.1f} s")
    writer.start_clock()

    pending: list[Metrics] = []  # of the steps since the last look, still on the device
    since, sampled = time.monotonic(), False
    profiler = monitor.Profiler(folder, config.train.profile_start, config.train.profile_steps)
    with monitor.CompileWatch() as compilations, contextlib.closing(profiler):
        for step in range(start + 1, total + 1):
            profiler.before(step - start - 1)
            unreadable += unreadable_ahead
            if step == start + 1:
                with distributed.stage("the first step"), compilations.expected():
                    state, metrics = jax.block_until_ready(compiled(state, placed, frozen))
            else:
                state, metrics = compiled(state, placed, frozen)
            pending.append(metrics)
            if profiler.after(step - start, metrics):
                writer.say(f"wrote a trace of {config.train.profile_steps} steps to {profiler.folder}")
            if step < total:
                # While the device works on this step, the host brings the next batch.
                placed = read()

            stopping = watch.stopping(step)
            saving = step % config.train.save_every == 0 or step == total or stopping
            if step % config.train.log_every == 0 or saving:
                history = jax.device_get(pending)
                check_finite(history, step, config.train.max_skipped_steps, checkpoints)
                if step % config.train.log_every == 0 or step == total:
                    now = time.monotonic()
                    speed = config.data.batch_size * len(pending) / (now - since)
                    values = {name: float(value) for name, value in history[-1].items() if name != "skipped"}
                    memory = monitor.peak_memory()
                    if memory is not None:
                        values["peak_memory_gib"] = memory / 2**30
                    values["images_per_second"] = speed
                    count = unreadable_before + distributed.sum_of_hosts(unreadable)
                    writer.write(step, {**values, "unreadable_images": count})
                since = time.monotonic()
                pending = []
            if saving:
                writer.sync()
                with compilations.expected():  # of the copies that a save starts with
                    checkpoints.save(step, state, config)
            if stopping:  # who asks doesn't wait for a grid or a FID
                checkpoints.wait()
                writer.say(f"{watch.reason}: saved step {step}; the same command goes on from here")
                raise SystemExit(watch.exit_code)
            if quick_fid is not None and quick_fid.due(step):
                # After the save: it takes minutes, and what goes wrong in it must not cost the steps before.
                with compilations.expected():
                    averaged = state["averages"][config.sample.average]
                    writer.add(step, "fid", quick_fid(generator, averaged, condition, frozen))
                since = time.monotonic()
            if requests is not None and (step % config.train.sample_every == 0 or step == total):
                with contextlib.nullcontext() if sampled else compilations.expected():
                    averaged = state["averages"][config.sample.average]
                    grid = sample_grid(generator, averaged, requests, config, mesh)
                sampled = True
                writer.write_image(step, "samples", grid, folder / "samples" / f"step_{step:08d}.png")
                writer.say(f"wrote {folder / 'samples' / f'step_{step:08d}.png'}")
                since = time.monotonic()
        checkpoints.wait()
    writer.say(f"done: step {total}, in {folder}")


def check_finite(
    history: list[dict[str, np.ndarray]], last_step: int, allowed: int, checkpoints: checkpoint.Checkpoints
) -> None:
    """Log the steps of `history` that were skipped; UserError once more than `allowed` in a row were."""
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


def sample_grid(
    generator: generate.Generator, params: Any, requests: Requests, config: ml_collections.ConfigDict, mesh: Mesh
) -> np.ndarray:
    """One uint8 image of samples in class order, or with their captions."""
    batch_size = config.sample.batch_size
    samples = np.concatenate(list(generate.generate_images(generator, params, requests, batch_size, mesh)))
    return images.sample_grid(samples, config.model.num_classes, requests.names)


# ---------------------------------------------------------------------------------------- setting up


def open_batches(
    config: ml_collections.ConfigDict, mesh: Mesh, source: sources.Source, condition: Condition, start_step: int = 0
) -> pipeline.Batches:
    """This host's rows of the batches from a step on."""
    data = config.data
    return pipeline.train_batches(
        source,
        image_size=image_sides(data.image_size),
        batch_size=data.batch_size,
        seed=config.seed,
        start_step=start_step,
        host_index=sharding.host_rank(mesh),
        host_count=jax.process_count(),
        num_workers=data.num_workers,
        flip=data.flip,
        max_unreadable=data.max_unreadable,
        encode_caption=condition.encode_caption,
    )


def grid_requests(
    config: ml_collections.ConfigDict, condition: Condition, frozen: dict[str, Any], prompts: Prompts | None
) -> Requests:
    """The pictures of the grids on the way: config.sample's, as many as a grid holds, evenly spread."""
    requests = sampling_requests(config.sample, condition, prompts, frozen).spread(config.sample.grid_images)
    # Computed once: an encoder that only these prompts need doesn't stay in memory.
    return requests.kept(config.sample.batch_size)


def start_from(config: ml_collections.ConfigDict, state: State, mesh: Mesh) -> State:
    """A new run's state with the weights of the checkpoint config.init_from, its averages and, if asked, its moments.

    An average that it hasn't starts from its "ema".
    """
    where = checkpoint.find(config.init_from)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state["params"])
    params = checkpoint.load_params(where, shapes, config, mesh)
    there = checkpoint.average_names(where)
    averages = {
        name: checkpoint.load_average(where, shapes["denoiser"], config, mesh, name if name in there else EMA)
        for name in state["averages"]
    }
    started = {**state, "params": params, "averages": averages}
    if config.init_optimizer:
        shapes = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state["opt_state"]
        )
        started["opt_state"] = checkpoint.load_optimizer(where, shapes)
    return started
