"""--mode=benchmark: seconds of the training step, the forward pass, sampling, the input pipeline and of starting.

Steps are timed on random images that lie on the device; the input pipeline reads the configured source by itself,
so its images/s and the step's say which of the two a run would wait for.
"""

from __future__ import annotations

import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh

from deco_jax import distributed, flops, generate, hardware, monitor, sharding
from deco_jax.config import image_sides
from deco_jax.data import pipeline, sources
from deco_jax.optimizer import make_optimizer
from deco_jax.train import abstract_networks, lower_train_step
from deco_jax.train_state import create_state
from deco_jax.workdir import make_workdir
from deco_jax.writer import write_json

Row = dict[str, Any]


def benchmark(config: ml_collections.ConfigDict, workdir: str, import_seconds: float) -> None:
    """Print a table and write WORKDIR/benchmark.json.

    Args:
        import_seconds: from the start of the process to here.
    """
    began = time.monotonic()
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
    sharding.check_batch(mesh, config.data.batch_size, "config.data.batch_size", config.optimizer.accumulate_steps)
    source = sources.open_source(config.data)
    sources.check_classes(source, config.model.num_classes)
    make_workdir(pathlib.Path(workdir))
    main_host = jax.process_index() == 0

    def say(text: str) -> None:
        if main_host:
            print(text, flush=True)

    chip = hardware.chip_of(jax.devices()[0])
    report: dict[str, Any] = {
        "device_kind": jax.devices()[0].device_kind,
        "devices": mesh.size,
        "mesh": dict(mesh.shape),
        "hosts": jax.process_count(),
        "chip": chip.name if chip else None,
        "model": config.model.name,
        "image_size": list(image_sides(config.data.image_size)),
        "batch_size": config.data.batch_size,
        "dtype": config.model.dtype,
        "remat": config.model.remat,
        "attention": config.model.attention,
        "teacher": bool(config.loss.repa_weight),
        "jax": jax.__version__,
        "rows": {},
    }
    peak = chip.peak * mesh.size if chip and config.model.dtype == "bfloat16" else None

    def add(name: str, seconds: list[float], images: int = 0, arithmetic: float = 0.0) -> None:
        report["rows"][name] = row(seconds, images, arithmetic, peak)
        say(f"  {line(name, report['rows'][name])}")

    say(f"{config.benchmark.warmup} runs to warm up, {config.benchmark.repeats} timed; median, min, max")
    say(f"  {HEADER}")
    add("import", [import_seconds])
    time_training(config, mesh, add, time.monotonic() - began)
    time_forward(config, mesh, add)
    time_input(config, mesh, source, add)
    memory = monitor.peak_memory()
    report["peak_memory_bytes"] = memory
    if main_host:
        path = pathlib.Path(workdir) / "benchmark.json"
        write_json(path, report)
        if memory is not None:
            say(f"peak memory of a device: {memory / 2**30:.2f} GiB")
        say(f"wrote {path}")


def time_training(config: ml_collections.ConfigDict, mesh: Mesh, add: Callable[..., None], set_up: float) -> None:
    """Rows: build, compile, first step, training step."""
    began = time.monotonic() - set_up
    networks, teacher, teacher_shapes = abstract_networks(config, mesh)
    # The teacher's values cost nothing and change nothing: its file needn't be there.
    teacher_params = jax.tree.map(
        lambda leaf: jax.jit(lambda: jnp.zeros(leaf.shape, leaf.dtype), out_shardings=leaf.sharding)(), teacher_shapes
    )
    optimizer = make_optimizer(config.optimizer)
    state = jax.block_until_ready(create_state(config.seed, networks, optimizer, mesh))
    batch = random_batch(config, mesh)
    add("build", [time.monotonic() - began])

    began = time.monotonic()
    with distributed.stage("compiling the training step"):
        step = lower_train_step(networks, optimizer, config, teacher, mesh, state, batch, teacher_params).compile()
    add("compile", [time.monotonic() - began])
    began = time.monotonic()
    state, metrics = jax.block_until_ready(step(state, batch, teacher_params))
    add("first step", [time.monotonic() - began])

    def run() -> Any:
        nonlocal state, metrics
        state, metrics = step(state, batch, teacher_params)
        return metrics

    size = config.data.batch_size
    add("train step", timed(run, config.benchmark), size, flops.training(config) * size)


def time_forward(config: ml_collections.ConfigDict, mesh: Mesh, add: Callable[..., None]) -> None:
    """Rows: forward, sample one image, sample a batch."""
    networks, _, _ = abstract_networks(config, mesh)
    network = networks["denoiser"]
    shardings = sharding.state_shardings(mesh, {"params": network.shapes})["params"]
    params = jax.jit(network.init, out_shardings=shardings)(jax.random.key(config.seed))
    size, batch = config.data.batch_size, random_batch(config, mesh)
    rows = sharding.batch_sharding(mesh)
    draw = jax.jit(lambda: jax.random.normal(jax.random.key(1), batch["image"].shape), out_shardings=rows)
    times = jax.jit(lambda: jax.random.uniform(jax.random.key(2), (size,)), out_shardings=rows)
    inputs = draw(), times(), batch["label"]
    forward = jax.jit(lambda *arguments: network.apply(*arguments)[0], out_shardings=rows)
    add(
        "forward", timed(lambda: forward(params, *inputs), config.benchmark),
        size, flops.forward_total(config.model, config.data.image_size) * size,
    )  # fmt: skip

    generator = generate.make_generator(network, config, mesh)
    few = ml_collections.ConfigDict({"warmup": 1, "repeats": min(5, config.benchmark.repeats)})
    counts = {"sample one image": mesh.size, f"sample {config.sample.batch_size}": config.sample.batch_size}
    for name, count in counts.items():
        if name == "sample one image" and mesh.size > 1:
            name = f"sample one image on each of {mesh.size} devices"
        count = -(-count // mesh.size) * mesh.size
        request = {
            "index": np.arange(count, dtype=np.int32), "label": generate.class_labels(count, config.model.num_classes)
        }  # fmt: skip
        placed = sharding.place_everywhere(mesh, request)
        add(name, timed(lambda: generator(params, placed), few), count, flops.sampling(config) * count)  # noqa: B023


def time_input(config: ml_collections.ConfigDict, mesh: Mesh, source: sources.Source, add: Callable[..., None]) -> None:
    """Row: one batch of the configured source, read, decoded and put on the devices."""
    batches = pipeline.train_batches(
        source, image_size=image_sides(config.data.image_size), batch_size=config.data.batch_size, seed=config.seed,
        host_index=sharding.host_rank(mesh), host_count=jax.process_count(), num_workers=config.data.num_workers,
        flip=config.data.flip, max_unreadable=config.data.max_unreadable,
    )  # fmt: skip

    def read() -> Any:
        batch = next(batches)
        del batch["unreadable"]
        return sharding.place_batch(mesh, batch)

    try:
        # What the workers had ready before the clock started must not count.
        ready = ml_collections.ConfigDict(
            {"warmup": config.benchmark.warmup + 3 * config.data.num_workers + 4, "repeats": config.benchmark.repeats}
        )
        add("input batch", timed(read, ready), config.data.batch_size)
    finally:
        batches.close()


def random_batch(config: ml_collections.ConfigDict, mesh: Mesh) -> dict[str, jax.Array]:
    """uint8 images and labels, made on the devices."""
    size = config.data.batch_size
    shape = (size, *image_sides(config.data.image_size), 3)

    def make() -> dict[str, jax.Array]:
        image_key, label_key = jax.random.split(jax.random.key(config.seed))
        return {
            "image": jax.random.bits(image_key, shape, jnp.uint8),
            "label": jax.random.randint(label_key, (size,), 0, max(1, config.model.num_classes), jnp.int32),
        }

    return jax.jit(make, out_shardings=sharding.batch_sharding(mesh))()


def timed(run: Callable[[], Any], settings: ml_collections.ConfigDict) -> list[float]:
    """Seconds of settings.repeats runs, each waited for, after settings.warmup runs."""
    for _ in range(settings.warmup):
        jax.block_until_ready(run())
    seconds = []
    for _ in range(settings.repeats):
        began = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - began)
    return seconds


def row(seconds: list[float], images: int, arithmetic: float, peak: float | None) -> Row:
    """Figures of one thing timed.

    Args:
        images: in a run; 0: images a second make no sense.
        arithmetic: FLOPs of a run on all devices; 0: none worth counting.
        peak: FLOP/s of all devices together, if known.
    """
    median = statistics.median(seconds)
    values: Row = {"seconds": {"median": median, "min": min(seconds), "max": max(seconds)}, "runs": len(seconds)}
    if images:
        values["images_per_second"] = images / median
    if arithmetic:
        values["tflop_per_second"] = arithmetic / median / 1e12
        if peak:
            values["share_of_peak"] = arithmetic / median / peak
    return values


HEADER = f"{'':<18}{'seconds':>10}{'min':>10}{'max':>10}{'images/s':>11}{'TFLOP/s':>10}{'of peak':>9}"


def line(name: str, values: Row) -> str:
    """A row of the table."""
    seconds = values["seconds"]
    text = f"{name:<18}" + "".join(f"{seconds[key]:>10.4g}" for key in ("median", "min", "max"))
    text += f"{values['images_per_second']:>11.4g}" if "images_per_second" in values else " " * 11
    text += f"{values['tflop_per_second']:>10.4g}" if "tflop_per_second" in values else " " * 10
    return (text + (f"{values['share_of_peak']:>9.1%}" if "share_of_peak" in values else "")).rstrip()
