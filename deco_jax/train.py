"""The training program, top to bottom.

uint8 batch ─ to_float ─ x ─┐
                 noise ε ───┼─ x_t = t·x + (1−t)·ε ─ denoiser ─ v̂ ─ v̂ − v ─┬─ pixel flow matching
         t ~ logit-normal ──┘         labels, dropped ─┘   │               ├─ JPEG-weighted DCT
uint8 batch ─ frozen DINOv2 ─ features ──────────── projector(hidden) ─────┴─ REPA
"""

from __future__ import annotations

import contextlib
import functools
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from absl import logging
from jax.sharding import Mesh

from deco_jax import checkpoint, distributed, generate, images, monitor, preemption, sharding
from deco_jax.config import image_sides, to_json
from deco_jax.convert.dinov2 import load_teacher
from deco_jax.data import pipeline, sources
from deco_jax.diffusion import path
from deco_jax.errors import UserError
from deco_jax.evaluate import QuickFID
from deco_jax.losses.flow_matching import flow_matching_loss
from deco_jax.losses.frequency import frequency_loss, jpeg_weights
from deco_jax.losses.repa import alignment_loss
from deco_jax.models import dinov2
from deco_jax.models import network as network_lib
from deco_jax.models.network import Network
from deco_jax.models.projector import make_projector
from deco_jax.optimizer import make_optimizer, update_average
from deco_jax.train_state import State, create_state, state_shapes
from deco_jax.workdir import make_workdir
from deco_jax.writer import Writer, write_json

Metrics = dict[str, jax.Array]
# uint8 images [batch, height, width, 3] and the teacher's weights → features [batch, tokens, teacher_width]
Teacher = Callable[[Any, jax.Array], jax.Array]


class Draws(NamedTuple):
    """What is random in a training step."""

    noise: jax.Array  # [batch, height, width, 3], standard normal
    times: jax.Array  # [batch] in (0, 1)
    dropped: jax.Array  # bool [batch]: trained without its label


# ---------------------------------------------------------------------------------------- the objective


def objective(
    params: Any,
    batch: dict[str, jax.Array],
    draws: Draws,
    features: jax.Array | None,
    *,
    networks: dict[str, Network],
    config: ml_collections.ConfigDict,
) -> tuple[jax.Array, Metrics]:
    """The DeCo loss of a batch (arXiv 2511.19365): flow matching + frequency-aware + REPA.

    Args:
        params: {"denoiser", "projector"}.
        batch: "image" uint8 [batch, height, width, 3], "label" int32 [batch].
        features: the teacher's [batch, tokens, teacher_width]; None without REPA.

    Returns:
        The loss, and its parts, unweighted: "pixel", "frequency", "alignment" as far as they are used.
    """
    loss, prediction = config.loss, config.model.prediction
    x = images.to_float(batch["image"])
    x_t = path.interpolate(x, draws.noise, draws.times)
    labels = jnp.where(draws.dropped, config.model.num_classes, batch["label"])

    aligned_layer = loss.repa_layer if features is not None else None
    output, hidden = networks["denoiser"].apply(params["denoiser"], x_t, draws.times, labels, aligned_layer)

    target = path.velocity(x, draws.noise) if prediction == "v" else x
    # Both sides through the same conversion: an x-prediction is compared where it becomes a velocity.
    error = path.to_velocity(output, x_t, draws.times, prediction) - path.to_velocity(
        target, x_t, draws.times, prediction
    )

    parts = {"pixel": flow_matching_loss(error)}
    total = parts["pixel"]
    if loss.frequency_weight:
        parts["frequency"] = frequency_loss(error, jpeg_weights(loss.frequency_quality))
        total = total + loss.frequency_weight * parts["frequency"]
    if features is not None:
        projected = networks["projector"].apply(params["projector"], hidden["aligned"])
        parts["alignment"] = alignment_loss(projected, features)
        total = total + loss.repa_weight * parts["alignment"]
    return jnp.mean(total), {name: jnp.mean(values) for name, values in parts.items()}


def draw(key: jax.Array, shape: tuple[int, ...], loss: ml_collections.ConfigDict) -> Draws:
    """The random part of a step for image batches of `shape`; depends on the key alone, not on devices."""
    noise_key, time_key, drop_key = jax.random.split(key, 3)
    return Draws(
        noise=jax.random.normal(noise_key, shape),
        times=path.sample_times(time_key, shape[0], loss.time_shift, loss.time_mean, loss.time_std),
        dropped=jax.random.bernoulli(drop_key, loss.label_dropout, (shape[0],)),
    )


# ---------------------------------------------------------------------------------------- one step


def make_train_step(
    networks: dict[str, Network],
    optimizer: optax.GradientTransformation,
    config: ml_collections.ConfigDict,
    teacher: Teacher | None = None,
) -> Callable[[State, dict[str, jax.Array], Any], tuple[State, Metrics]]:
    """(state, batch, teacher's weights) → (state, metrics), to be jitted with the state donated.

    A step whose loss or gradient is not finite changes no weight; it is counted in state["skipped"].
    """
    gradient = jax.value_and_grad(functools.partial(objective, networks=networks, config=config), has_aux=True)
    accumulate = config.optimizer.accumulate_steps

    def loss_and_gradient(params: Any, batch: Any, draws: Draws, teacher_params: Any) -> tuple[Any, Any]:
        features = None
        if teacher is not None:
            features = jax.lax.stop_gradient(teacher(teacher_params, batch["image"]))
        (loss, parts), grads = gradient(params, batch, draws, features)
        return {"loss": loss, **parts}, grads

    def train_step(state: State, batch: dict[str, jax.Array], teacher_params: Any) -> tuple[State, Metrics]:
        key = jax.random.fold_in(jax.random.key(config.seed), state["step"])
        draws = draw(key, batch["image"].shape, config.loss)
        if accumulate == 1:
            metrics, grads = loss_and_gradient(state["params"], batch, draws, teacher_params)
        else:
            # Part i takes every accumulate-th row, so that each device works on its own rows in every part.
            parts = jax.tree.map(lambda a: jnp.swapaxes(a.reshape(-1, accumulate, *a.shape[1:]), 0, 1), (batch, draws))

            def add(total: Any, part: Any) -> tuple[Any, None]:
                part_batch, part_draws = part
                result = loss_and_gradient(state["params"], part_batch, part_draws, teacher_params)
                return jax.tree.map(jnp.add, total, result), None

            batch, draws = jax.tree.map(lambda a: a[0], parts)
            zeros = jax.tree.map(
                lambda a: jnp.zeros(a.shape, a.dtype),
                jax.eval_shape(loss_and_gradient, state["params"], batch, draws, teacher_params),
            )
            summed, _ = jax.lax.scan(add, zeros, parts)
            metrics, grads = jax.tree.map(lambda a: a / accumulate, summed)

        norm = optax.tree.norm(grads)
        updates, opt_state = optimizer.update(grads, state["opt_state"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        ema = update_average(state["ema"], params["denoiser"], config.optimizer.ema_decay)

        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
        changed = {"params": params, "ema": ema, "opt_state": opt_state}
        kept = {name: state[name] for name in changed}
        new_state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), changed, kept)
        new_state["step"] = state["step"] + 1
        new_state["skipped"] = jnp.where(finite, 0, state["skipped"] + 1)
        return new_state, {**metrics, "gradient_norm": norm, "skipped": new_state["skipped"]}

    return train_step


def lower_train_step(
    networks: dict[str, Network], optimizer: optax.GradientTransformation, config: ml_collections.ConfigDict,
    teacher: Teacher | None, mesh: Mesh, state: State, batch: dict[str, Any], teacher_params: Any,
) -> jax.stages.Lowered:  # fmt: skip
    """`make_train_step` for a state, batch and teacher's weights (arrays, or shapes with shardings), to be compiled."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    step = jax.jit(
        make_train_step(networks, optimizer, config, teacher), donate_argnums=0,
        out_shardings=(shardings, sharding.replicated(mesh)),
    )  # fmt: skip
    return step.lower(state, batch, teacher_params)


# ---------------------------------------------------------------------------------------- the program


def train(config: ml_collections.ConfigDict, workdir: str) -> None:
    """Train to config.train.num_steps, from the newest checkpoint in the workdir if there is one."""
    folder = pathlib.Path(workdir)

    # Everything that can be wrong is found before anything compiles or is written.
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
    sharding.check_batch(mesh, config.data.batch_size, "config.data.batch_size", config.optimizer.accumulate_steps)
    source = sources.open_source(config.data)
    sources.check_classes(source, config.model.num_classes)
    networks, teacher, teacher_params = make_networks(config, mesh)
    optimizer = make_optimizer(config.optimizer)
    shapes = state_shapes(networks, optimizer, mesh)
    quick_fid = QuickFID(config, folder, mesh) if config.evaluate.every else None
    if config.init_from and not checkpoint.complete_steps(folder):
        checkpoint.find(config.init_from, config=config)
    make_workdir(folder)

    checkpoints = checkpoint.Checkpoints(folder, config.train.keep_checkpoints)
    with distributed.stage("reading the newest checkpoint"):
        state = checkpoints.restore(shapes, config)
    resumed = state is not None
    if state is None:
        with distributed.stage("creating the state"):
            state = create_state(config.seed, networks, optimizer, mesh)
            if config.init_from:
                state = start_from(config, state, mesh)
    start = int(state["step"])
    checkpoints.remove_after(start)
    main_host = jax.process_index() == 0
    if main_host:
        write_json(folder / "config.json", to_json(config))
    writer = Writer(folder, config.train.num_steps, resumed_at=start, active=main_host)
    writer.say(
        f"{config.model.name} with {networks['denoiser'].num_params:,} parameters on "
        f"{mesh.size} {jax.devices()[0].platform} device(s); {len(source):,} images of {source.num_classes} classes; "
        + (f"resumed at step {start}" if resumed else "a new run")
    )
    if start >= config.train.num_steps:
        writer.say(f"already trained to step {start}; raise config.train.num_steps to go on")
        writer.close()
        return

    batches = pipeline.train_batches(
        source, image_size=image_sides(config.data.image_size), batch_size=config.data.batch_size, seed=config.seed,
        start_step=start, host_index=sharding.host_rank(mesh), host_count=jax.process_count(),
        num_workers=config.data.num_workers, flip=config.data.flip, max_unreadable=config.data.max_unreadable,
    )  # fmt: skip
    try:
        # From here on, compiling included, a signal asks to save and stop.
        with preemption.Watch() as watch:
            run(
                config, folder, mesh, networks, optimizer, teacher, teacher_params, state, batches, checkpoints, writer,
                watch, quick_fid,
            )  # fmt: skip
    finally:
        batches.close()
        writer.close()
        checkpoints.close()


def run(
    config: ml_collections.ConfigDict, folder: pathlib.Path, mesh: Mesh, networks: dict[str, Network],
    optimizer: optax.GradientTransformation, teacher: Teacher | None, teacher_params: Any, state: State,
    batches: pipeline.Batches, checkpoints: checkpoint.Checkpoints, writer: Writer, watch: preemption.Watch,
    quick_fid: QuickFID | None = None,
) -> None:  # fmt: skip
    """The loop of `train`, with everything made."""
    start, total = int(state["step"]), config.train.num_steps
    generator = generate.make_generator(networks["denoiser"], config, mesh)
    labels = generate.class_labels(min(config.sample.num_images, config.sample.grid_images), config.model.num_classes)

    with distributed.stage("reading the first batch"):
        batch = next(batches)
    unreadable = len(batch.pop("unreadable"))
    placed = sharding.place_batch(mesh, batch)
    writer.say("compiling the training step ...")
    began = time.monotonic()
    # Compiled once, for these shapes: another shape or sharding later is an error, not a silent recompilation.
    with distributed.stage("compiling the training step"):
        compiled = lower_train_step(networks, optimizer, config, teacher, mesh, state, placed, teacher_params).compile()
    writer.say(f"compiled in {time.monotonic() - began:.1f} s")
    writer.start_clock()

    pending: list[Metrics] = []  # of the steps since the last look, still on the device
    since, sampled = time.monotonic(), False
    profiler = monitor.Profiler(folder, config.train.profile_start, config.train.profile_steps)
    with monitor.CompileWatch() as compilations, contextlib.closing(profiler):
        for step in range(start + 1, total + 1):
            profiler.before(step - start - 1)
            if step == start + 1:
                with distributed.stage("the first step"), compilations.expected():
                    state, metrics = jax.block_until_ready(compiled(state, placed, teacher_params))
            else:
                state, metrics = compiled(state, placed, teacher_params)
            pending.append(metrics)
            if profiler.after(step - start, metrics):
                writer.say(f"wrote a trace of {config.train.profile_steps} steps to {profiler.folder}")
            if step < total:
                # While the device works on this step, the host brings the next batch.
                batch = next(batches)
                unreadable += len(batch.pop("unreadable"))
                placed = sharding.place_batch(mesh, batch)

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
                    if quick_fid is not None and quick_fid.due(step):
                        with compilations.expected():
                            values["fid"] = quick_fid(generator, state["ema"])
                    writer.write(step, {**values, "images_per_second": speed, "unreadable_images": unreadable})
                since = time.monotonic()
                pending = []
            if saving:
                with compilations.expected():  # of the copies that a save starts with
                    checkpoints.save(step, state, config)
            if config.train.sample_every and (step % config.train.sample_every == 0 or step == total):
                with contextlib.nullcontext() if sampled else compilations.expected():
                    grid = sample_grid(generator, state["ema"], labels, config, mesh)
                sampled = True
                writer.write_image(step, "samples", grid, folder / "samples" / f"step_{step:08d}.png")
                writer.say(f"wrote {folder / 'samples' / f'step_{step:08d}.png'}")
                since = time.monotonic()
            if stopping:
                checkpoints.wait()
                writer.say(f"{watch.reason}: saved step {step}; the same command goes on from here")
                raise SystemExit(watch.exit_code)
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
    generator: generate.Generator, params: Any, labels: np.ndarray, config: ml_collections.ConfigDict, mesh: Mesh
) -> np.ndarray:
    """One uint8 image of samples in class order."""
    batch_size = config.sample.batch_size
    samples = np.concatenate(list(generate.generate_images(generator, params, labels, batch_size, mesh)))
    return images.sample_grid(samples, config.model.num_classes)


# ---------------------------------------------------------------------------------------- setting up


def make_networks(config: ml_collections.ConfigDict, mesh: Mesh) -> tuple[dict[str, Network], Teacher | None, Any]:
    """The networks that train, and the frozen teacher with its weights on the mesh (None and {} without REPA)."""
    networks, teacher, shapes = abstract_networks(config, mesh)
    if teacher is None:
        return networks, None, {}
    params = load_teacher(config.teacher.path, config.teacher.size, dtype=jnp.dtype(config.teacher.dtype))
    return networks, teacher, jax.device_put(params, jax.tree.map(lambda leaf: leaf.sharding, shapes))


def abstract_networks(config: ml_collections.ConfigDict, mesh: Mesh) -> tuple[dict[str, Network], Teacher | None, Any]:
    """`make_networks` without reading a file: the teacher's weights are ShapeDtypeStructs with shardings."""
    networks = {"denoiser": network_lib.build(config.model.to_dict())}
    if not config.loss.repa_weight:
        return networks, None, {}
    teacher = teacher_network(config)
    teacher_width, _, _ = dinov2.sizes(config.teacher.size)
    networks["projector"] = make_projector(config.model, teacher_width)
    placed = sharding.state_shardings(mesh, {"teacher": teacher.shapes})["teacher"]
    dtype = jnp.dtype(config.teacher.dtype)
    shapes = jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=where), teacher.shapes, placed
    )
    return networks, functools.partial(teacher_features, teacher, config.model.patch_size), shapes


def teacher_network(config: ml_collections.ConfigDict) -> Network:
    """DINOv2 of config.teacher, its forward pass in config.teacher.dtype."""
    dtype = jnp.dtype(config.teacher.dtype)
    return network_lib.functional(lambda rngs: dinov2.DINOv2.of_size(config.teacher.size, dtype=dtype, rngs=rngs))


def teacher_features(teacher: Network, patch_size: int, params: Any, images: jax.Array) -> jax.Array:
    """uint8 [batch, height, width, 3] → the features [batch, tokens, teacher_width] that REPA aligns with."""
    return teacher.apply(params, images, patch_size)


def start_from(config: ml_collections.ConfigDict, state: State, mesh: Mesh) -> State:
    """A new run's state with the weights of the checkpoint config.init_from; the EMA starts from its EMA."""
    where = checkpoint.find(config.init_from)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state["params"])
    params = checkpoint.load_params(where, shapes, config, mesh)
    ema = checkpoint.load_average(where, shapes["denoiser"], config, mesh)
    return {**state, "params": params, "ema": ema}


def _no_init(*_: Any) -> Any:
    raise TypeError("only the shapes are used")
