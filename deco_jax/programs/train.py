"""The training program: set-up, loop, and periodic actions."""

from __future__ import annotations

import contextlib
import functools
import json
import pathlib
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import ml_collections
from jax.sharding import Mesh

from deco_jax import interrupts
from deco_jax.api import CLASSES
from deco_jax.conditioning.condition import Condition, open_condition
from deco_jax.conditioning.requests import Prompts, Requests, data_requests, open_prompts, sampling_requests
from deco_jax.data import imagenet, pipeline, sources
from deco_jax.data.transforms import image_sides
from deco_jax.errors import UserError
from deco_jax.evaluation.adm import ADM, make_quick_fid
from deco_jax.evaluation.evaluator import Subject
from deco_jax.evaluation.image_sets import drawn_images
from deco_jax.evaluation.validation_loss import method_to_compare, validation_of_training
from deco_jax.method.lora import adapter_of
from deco_jax.method.objective import make_method
from deco_jax.method.optimizer import make_optimizer
from deco_jax.method.training import (
    COMPILER,
    Batch,
    Metrics,
    abstract_networks,
    choose_remat,
    load_frozen,
    lower_train_step,
)
from deco_jax.programs import measure
from deco_jax.programs.actions import Action, CopyLocally, Evaluate, FirstTime, Grid, Log, Reader, Save, TrainingRun
from deco_jax.run import adapted, checkpoint, distributed, monitor, preemption, settings, sharding, storage, tracking
from deco_jax.run.best import Best
from deco_jax.run.goodput import START, Goodput
from deco_jax.run.local_copies import LocalCopies
from deco_jax.run.start import as_stored, start_from
from deco_jax.run.state import State, create_state, state_shapes
from deco_jax.run.watchdog import Watchdog
from deco_jax.run.workdir import make_workdir
from deco_jax.run.writer import Writer, write_json, write_overview
from deco_jax.sampling import generate
from deco_jax.sampling.weaker import Guide, check_average, load_other

TrainStep = Callable[[State, Batch, dict[str, Any]], tuple[State, Metrics]]


def train(config: ml_collections.ConfigDict, workdir: str, checkpoint_path: str = "") -> None:
    """Train to config.train.num_steps, from the newest checkpoint in the workdir if there is one.

    Args:
        checkpoint_path: of another run, from which a workdir without checkpoints continues: step, weights, moments.
    """
    folder = storage.path(workdir)

    # Find everything that can be wrong before anything compiles or is written.
    if config.train.wandb:
        distributed.on_main_host(lambda: tracking.check(config.train.wandb))
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, slices=config.mesh.slices)
    sharding.check_batch(mesh, config.data.batch_size, "config.data.batch_size", config.optimizer.accumulate_steps)
    with distributed.stage("listing the images"):
        source = sources.open_source(config.data)
        distributed.check_same_data(source)
    prompts = open_prompts(config) if config.train.sample_every else None
    condition = open_condition(config, mesh, source)
    if config.init_from and checkpoint_path:
        raise UserError(
            "--checkpoint continues a run and config.init_from starts a new one with its weights; give only one of them"
        )
    fresh = left_out = ""
    adaptation = adapted.Adaptation(config, folder, checkpoint_path, mesh) if adapter_of(config) else None
    if (config.init_from or checkpoint_path) and not checkpoint.complete_steps(folder) and adaptation is None:
        like = as_stored(checkpoint.find(config.init_from), config) if config.init_from else config
        begins_with = checkpoint.find(checkpoint_path or config.init_from, config=like)
        if config.init_from and not config.loss.repa_weight and checkpoint.has_projector(begins_with):
            left_out = f"{config.init_from} has a REPA projector, which is left out because config.loss.repa_weight=0"
        else:
            checkpoint.check_projector(begins_with, config)
        if left_out and config.init_optimizer:
            raise UserError(f"{left_out}, but its moments can't be; set config.init_optimizer=False")
        if like.model.num_classes != config.model.num_classes:
            fresh = (
                f"the label table starts from scratch, with {config.model.num_classes:,} classes instead of the "
                f"{like.model.num_classes:,} of {config.init_from}"
            )
        elif like.model.mean_velocity != config.model.mean_velocity:
            fresh = f"{config.init_from} learnt the velocity; what MeanFlow adds to it starts from scratch"
        if fresh and config.init_optimizer:
            raise UserError(f"{fresh}, and has no moments there; set config.init_optimizer=False")
    changed = {}
    if checkpoint.complete_steps(folder):
        settings.check_kept(folder, config)
        changed = settings.changes(folder, config)
    check_same_classes(folder, source.class_names)
    quick_fid = make_quick_fid(config, folder, mesh) if config.evaluate.every else None
    best = Best(config, quick_fid.titles if quick_fid else ()) if config.train.keep_best else None
    optimizer = make_optimizer(config.optimizer)
    method = make_method(config)
    averages = method.averages
    if config.sample.average not in averages:
        raise UserError(
            f"config.sample.average={config.sample.average!r} is not an average that this run keeps; choose from "
            f"{', '.join(averages)}, or add it to config.optimizer.averages"
        )
    check_average(config.sample, averages)
    other = load_other(config, mesh)
    frozen = load_frozen(method, mesh) | condition.load()  # before anything compiles: a file may be missing
    compared = method_to_compare(config)
    validation = validation_of_training(config, mesh, condition, source) if config.train.validate_every else None
    requests = grid_requests(config, condition, frozen, prompts) if config.train.sample_every else None
    if adaptation:
        with distributed.stage("reading the pretrained weights"):
            frozen |= adaptation.load(source.class_names)
    # The shared folder first: if it is refused, the workdir hasn't been created yet.
    for written in (*([storage.path(config.evaluate.cache)] if quick_fid and config.evaluate.cache else []), folder):
        make_workdir(written)

    checkpoints = checkpoint.Checkpoints(
        folder, config.train.keep_checkpoints, keep_every=config.train.keep_every, best=best
    )
    main_host = jax.process_index() == 0
    goodput = Goodput(folder if main_host else None)
    copies = LocalCopies(config, folder) if config.train.local_copies else None
    if copies and adaptation and not checkpoints.steps():
        # They have factors for the frozen weights of an earlier start, which may have been others.
        copies.clear()
    with goodput.spending("compile"):
        settled, remat = choose_remat(config, mesh, condition)
    networks, observe, _ = abstract_networks(settled, mesh, condition)
    shapes = state_shapes(networks, optimizer, mesh, averages, method.measured)
    with distributed.stage("reading the newest checkpoint"), goodput.spending("restore"):
        state = copies.restore(shapes, newer_than=max(checkpoints.steps(), default=0)) if copies else None
        if state is None:
            state = checkpoints.restore(shapes, config)
        if state is None and checkpoint_path:
            state = checkpoint.load_state(checkpoint.find(checkpoint_path), shapes, config)
    resumed = state is not None
    if state is None:
        with distributed.stage("creating the state"), goodput.spending(START):
            state = create_state(config.seed, networks, optimizer, mesh, averages, method.measured)
            if adaptation:
                adaptation.begin(state)
            elif config.init_from:
                state = start_from(config, state, mesh)
        if (names := method.prediction.measured) and config.init_from:
            state["measured"] |= checkpoint.load_measured(checkpoint.find(config.init_from), names, mesh)
        elif names:
            state["measured"] |= measure.measure(config, mesh, source, method.prediction)
    elif method.measured:
        checkpoint.check_measured(folder, state["measured"], method.prediction.measured)
        state["measured"] = measure.place(method.measured, mesh) | state["measured"]
    start = int(state["step"])
    checkpoints.set_aside_after(start)
    if best:
        best.read(folder, start, changed)
    if adaptation and not checkpoints.steps():
        checkpoint.save_base(folder, adaptation.base)
    if main_host and (start < config.train.num_steps or not (folder / "config.json").exists()):
        settings.record(folder, config, start)
    if main_host:
        write_json(folder / CLASSES, imagenet.readable(source.class_names))
        write_overview(folder / "parameters.txt", state["params"])
    writer = Writer(folder, config.train.num_steps, resumed_at=start, active=main_host, config=config)
    writer.say(
        f"{config.model.name} with {networks['denoiser'].num_params:,} parameters on "
        f"{mesh.size} {jax.devices()[0].platform} device(s); {len(source):,} images "
        + (f"of {source.num_classes} classes; " if source.num_classes else "with captions; ")
        + (f"resumed at step {start}" if resumed else "a new run")
    )
    notes = (source.notes(), left_out, fresh, adaptation.note if adaptation else "", remat.note if remat else "")
    for line in (settings.said(changed), *notes):
        if line:
            writer.say(line)
    if start >= config.train.num_steps:
        writer.say(f"already trained to step {start}; to continue, raise config.train.num_steps")
        writer.close()
        checkpoints.close()
        return

    goodput.resumed(start)
    merge = adaptation.merge if adaptation else None
    denoiser = generate.make_denoiser(config).given(state.get("measured", {}))
    generator, guide = generate.Generator(denoiser, mesh), Guide(config.sample, denoiser, other)
    run = TrainingRun(config, folder, mesh, condition, frozen, checkpoints, writer, goodput, guide, merge, best)

    def make_actions(log: Log) -> list[Action]:
        """Make the actions in order: what takes minutes comes after the save, so that it can't cost the save."""
        actions: list[Action] = [log, Save(run, log)]
        if copies is not None:
            actions.append(CopyLocally(run, log, copies))
        if quick_fid is not None:
            actions.append(Evaluate(run, config.evaluate.every, fid_of_samples(run, generator, quick_fid)))
        if validation is not None:
            every, score = config.train.validate_every, validation
            actions.append(Evaluate(run, every, lambda state: score(run.subject(state)).values))
        if requests is not None:
            actions.append(Grid(run, generator, requests))
        return actions

    batches = open_batches(config, mesh, source, condition, start)
    try:
        # From here on, also while compiling, a signal asks to save and stop.
        with preemption.Watch() as watch, distributed.ending_with_the_others():
            reader = Reader(run, batches)
            with distributed.stage("reading the first batch"), goodput.spending("data"):
                batch = reader()

            def compile_step(done: int, state: State, batch: Batch) -> TrainStep:
                """Compile the step that follows `done` steps, valid as long as the same losses apply."""
                ended = [loss.name for loss in method.losses if 0 < loss.until_step <= done]
                if remat and remat.compiled and not ended:
                    return remat.compiled
                began = time.monotonic()
                for name in method.frozen.keys() - method.at(done).frozen.keys() - compared.frozen.keys():
                    run.frozen.pop(name, None)  # of losses that have ended: its memory is free
                # Compiled once, for these shapes: another shape or sharding later is an error, not a recompilation.
                with (
                    interrupts.waits_for(COMPILER),
                    distributed.stage("compiling the training step"),
                    goodput.spending("compile"),
                ):
                    writer.say(f"compiling the training step{' without ' * bool(ended)}{', '.join(ended)} ...")
                    compiled = lower_train_step(
                        networks, optimizer, config, observe, mesh, state, batch, run.frozen, done
                    ).compile()
                writer.say(f"compiled in {time.monotonic() - began:.1f} s")
                return compiled

            loop(run, compile_step, method.ends, state, reader, batch, make_actions, watch)
            if copies is not None:
                copies.remove()
    finally:
        batches.close()
        writer.close()
        checkpoints.close()


def check_same_classes(folder: pathlib.Path, names: list[str]) -> None:
    """Raise UserError if a resumed run's labels would mean other classes than it was trained on so far."""
    path = folder / CLASSES
    if not path.exists() or not checkpoint.complete_steps(folder):
        return
    before, names = imagenet.readable(json.loads(path.read_text())), imagenet.readable(names)
    changed = [f"{i} was {a!r} and is {b!r}" for i, (a, b) in enumerate(zip(before, names, strict=False)) if a != b]
    if before != names:
        what = changed[0] if changed else f"there were {len(before):,} and are {len(names):,}"
        raise UserError(
            f"{folder} was trained on other classes: {what}; give it the same data, or another --workdir with "
            f"--config.init_from; if only the names changed, remove {path}"
        )


def loop(
    run: TrainingRun,
    compile_step: Callable[[int, State, Batch], TrainStep],
    ends: Collection[int],
    state: State,
    reader: Reader,
    batch: Batch,
    make_actions: Callable[[Log], list[Action]],
    watch: preemption.Watch,
) -> None:
    """Train to config.train.num_steps, starting from a state and the first batch.

    Args:
        compile_step: (steps done, state, batch) → the compiled step from there on.
        ends: numbers of steps after which it is compiled again, because a loss ends.
    """
    train = run.config.train
    start, total = int(state["step"]), train.num_steps
    train_step = compile_step(start, state, batch)
    run.writer.start_clock()
    log = Log(run, reader.unreadable)
    actions = make_actions(log)
    profiler = monitor.Profiler(run.folder, train.profile_start, train.profile_steps)
    watchdog = Watchdog(run.folder, train.step_timeout, run.goodput.clock)
    distributed.wait_for_all("first_step")
    with monitor.CompileWatch() as compilations, contextlib.closing(profiler), watchdog:
        may_compile = FirstTime(compilations)
        for step in range(start + 1, total + 1):
            if step > start + 1 and step - 1 in ends:
                with compilations.expected(), watchdog.resting():
                    train_step = compile_step(step - 1, state, batch)
                    distributed.wait_for_all(f"step_{step}")
                log.restart_clock()
            profiler.before(step - start - 1)
            if step == start + 1:
                with distributed.stage("the first step"), compilations.expected():
                    state, metrics = train_step(state, batch, run.frozen)
                    run.goodput.handed_over(step, metrics)
                    jax.block_until_ready(metrics)
            else:
                state, metrics = train_step(state, batch, run.frozen)
                run.goodput.handed_over(step, metrics)
            watchdog.handed_over(step)
            log.add(metrics)
            with watchdog.resting():
                if profiler.after(step - start, metrics):
                    run.writer.say(f"wrote a trace of {train.profile_steps} steps to {profiler.folder}")
            # While the device works on this step, the host fetches the next batch.
            reader.used()
            if step < total:
                try:
                    with run.goodput.spending("data"):
                        batch = reader()
                except pipeline.WorkerLostError:
                    if jax.process_count() == 1:  # several hosts save together or not at all
                        for action in actions:
                            if action.hurried and action.due(step, stopping=True):
                                with may_compile(action):
                                    action(step, state)
                        run.checkpoints.wait()
                        run.writer.say(f"saved step {step}")
                    raise

            stopping = watch.reached()
            done = []
            for action in actions:
                if action.due(step, stopping) and (action.hurried or not stopping):
                    try:
                        with may_compile(action), contextlib.nullcontext() if action.hurried else watch.leaving():
                            with run.goodput.spending(action.spends), watchdog.resting():
                                if action(step, state) is not False:
                                    done.append(action)
                    except preemption.StopRequestedError:
                        stopping = True
                    log.restart_clock()
            if stopping:
                with run.goodput.spending("saving"), watchdog.resting():
                    for action in actions:  # what is due only because of the stop: the save
                        if action.hurried and action not in done and action.due(step, stopping):
                            with may_compile(action):
                                action(step, state)
                    run.checkpoints.wait()
                run.writer.say(run.goodput.close(step))
                run.writer.say(f"{watch.reason}: saved step {step}; the same command continues from here")
                raise SystemExit(watch.exit_code)
        with run.goodput.spending("saving"), watchdog.resting():
            run.checkpoints.wait()
    run.writer.say(run.goodput.close(total))
    run.writer.say(f"done: step {total}, in {run.folder}")


# ---------------------------------------------------------------------------------------- setting up


def open_batches(
    config: ml_collections.ConfigDict, mesh: Mesh, source: sources.Source, condition: Condition, start_step: int = 0
) -> pipeline.Batches:
    """Open this host's rows of the batches, from a step on."""
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
        fast_crop=data.fast_crop,
        flip=data.flip,
        random_crop=data.random_crop,
        max_unreadable=data.max_unreadable,
        encode_caption=condition.encode_caption,
    )


def fid_of_samples(
    run: TrainingRun, generator: generate.Generator, quick_fid: ADM
) -> Callable[[State], Mapping[str, float]]:
    """Make the quick FID: of samples from a state's average, for all classes or the data's captions."""
    config, count = run.config, run.config.evaluate.during_training_images
    requests = functools.cache(lambda: data_requests(config.sample, run.condition, count, run.frozen))

    def measure(state: State) -> Mapping[str, float]:
        params, sampling = run.averaged(state), run.sampling(state)
        draw = functools.partial(generator.images, params, requests(), sampling, config.sample.batch_size)
        samples = drawn_images(draw, count, sampling.size)
        return quick_fid(Subject(samples, params, run.frozen)).values

    return measure


def grid_requests(
    config: ml_collections.ConfigDict, condition: Condition, frozen: dict[str, Any], prompts: Prompts | None
) -> Requests:
    """Return the requests for the grids during training: config.sample's, as many as a grid holds, evenly spread."""
    requests = sampling_requests(config.sample, condition, prompts, frozen).spread(config.sample.grid_images)
    # Computed once: an encoder that only these prompts need doesn't stay in memory.
    return requests.kept(config.sample.batch_size)
