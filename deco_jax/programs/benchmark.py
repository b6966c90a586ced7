"""--mode=benchmark: times the training step, the forward pass, sampling, the input pipeline and the start.

Steps are timed on random images that are already on the device; the input pipeline reads the configured source
separately. Comparing the images/s of both shows which of the two a run would wait for.
"""

from __future__ import annotations

import functools
import importlib.util
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import ml_dtypes
import numpy as np
from jax.sharding import Mesh

from deco_jax import flops
from deco_jax.conditioning.condition import Condition, open_condition
from deco_jax.conditioning.requests import even_labels
from deco_jax.data import comparison, sources
from deco_jax.data.transforms import image_sides
from deco_jax.errors import UserError
from deco_jax.method.objective import make_method
from deco_jax.method.optimizer import make_optimizer
from deco_jax.method.training import abstract_networks, choose_remat, lower_observe, lower_train_step
from deco_jax.models import inception
from deco_jax.models import network as network_lib
from deco_jax.programs.train import open_batches
from deco_jax.run import choices, distributed, hardware, monitor, sharding, storage
from deco_jax.run.state import create_state
from deco_jax.run.workdir import make_workdir
from deco_jax.run.writer import write_json
from deco_jax.sampling import generate
from deco_jax.sampling.settings import Sampling
from deco_jax.sampling.weaker import Guide, load_other

Row = dict[str, Any]


def benchmark(config: ml_collections.ConfigDict, workdir: str, import_seconds: float) -> None:
    """Print a table and write WORKDIR/benchmark.json.

    Args:
        import_seconds: time from the start of the process to here.
    """
    began = time.monotonic()
    if "torch" in config.benchmark.parts.split(",") and not importlib.util.find_spec("torch"):
        raise UserError("config.benchmark.parts: torch needs PyTorch, pip install torch; or leave it out")
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, slices=config.mesh.slices)
    sharding.check_batch(mesh, config.data.batch_size, "config.data.batch_size", config.optimizer.accumulate_steps)
    source = sources.open_source(config.data)
    condition = open_condition(config, mesh, source)
    make_workdir(storage.path(workdir))
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
        "attention": choices.attention(
            config.model.attention, config.model.dtype, config.model.width // config.model.num_heads
        ),
        "teacher": bool(config.loss.repa_weight),
        "jax": jax.__version__,
        "rows": {},
    }
    peak = chip.peak * mesh.size if chip and config.model.dtype == "bfloat16" else None

    def add(name: str, seconds: list[float], images: int = 0, arithmetic: float = 0.0) -> None:
        report["rows"][name] = row(seconds, images, arithmetic, peak)
        say(f"  {line(name, report['rows'][name])}")

    say(f"{config.benchmark.warmup} warm-up runs, {config.benchmark.repeats} timed runs; median, min, max")
    say(f"  {HEADER}")
    add("import", [import_seconds])
    config, remat = choose_remat(config, mesh, condition)
    if remat is not None:
        say(remat.note)
    report["remat"] = config.model.remat
    parts = config.benchmark.parts.split(",")
    if "train" in parts:
        report["train_step_bytes"] = time_training(config, mesh, condition, add, time.monotonic() - began)
    if "forward" in parts or "sample" in parts:
        time_forward(config, mesh, add)
    if "input" in parts or "torch" in parts:
        time_input(config, mesh, source, condition, add)
        report["input"] = input_per_core(config, source, report["rows"].get("train step"), mesh.size)
        say(describe_input(report["input"]))
    if "inception" in parts:
        time_inception(config, mesh, add)
    memory = monitor.peak_memory()
    report["peak_memory_bytes"] = memory
    if main_host:
        path = storage.path(workdir) / "benchmark.json"
        write_json(path, report)
        if "train" in parts:
            sizes = ", ".join(f"{name} {value / 2**30:.2f}" for name, value in report["train_step_bytes"].items())
            say(f"GiB per device, according to the compiled training step: {sizes}")
        if memory is not None:
            say(f"peak memory per device: {memory / 2**30:.2f} GiB")
        say(f"wrote {path}")


def time_training(
    config: ml_collections.ConfigDict, mesh: Mesh, condition: Condition, add: Callable[..., None], set_up: float
) -> dict[str, int]:
    """Add rows for build, compile, first step, train step, and for the step's frozen networks alone if it has any.

    Returns:
        Bytes per device of the compiled step, as from `monitor.program_bytes`.
    """
    began = time.monotonic() - set_up
    networks, observe, shapes = abstract_networks(config, mesh, condition)
    # The values of frozen weights don't affect the time, so their files aren't needed.
    frozen = jax.tree.map(
        lambda leaf: jax.jit(lambda: jnp.zeros(leaf.shape, leaf.dtype), out_shardings=leaf.sharding)(), shapes
    )
    optimizer = make_optimizer(config.optimizer)
    method = make_method(config)
    state = jax.block_until_ready(
        create_state(config.seed, networks, optimizer, mesh, method.averages, method.measured)
    )
    batch = random_batch(config, mesh, condition)
    add("build", [time.monotonic() - began])

    began = time.monotonic()
    with distributed.stage("compiling the training step"):
        step = lower_train_step(networks, optimizer, config, observe, mesh, state, batch, frozen).compile()
    add("compile", [time.monotonic() - began])
    began = time.monotonic()
    state, metrics = jax.block_until_ready(step(state, batch, frozen))
    add("first step", [time.monotonic() - began])

    def run() -> Any:
        nonlocal state, metrics
        state, metrics = step(state, batch, frozen)
        return metrics

    size = config.data.batch_size
    add("train step", timed(run, config.benchmark), size, flops.training(config) * size)
    if frozen.keys() & {"teacher", "encoder"}:
        look = lower_observe(observe, mesh, frozen, batch).compile()
        add("its frozen part", timed(lambda: look(frozen, batch), config.benchmark), size, flops.frozen(config) * size)
    return monitor.program_bytes(step)


def time_forward(config: ml_collections.ConfigDict, mesh: Mesh, add: Callable[..., None]) -> None:
    """Add the rows that config.benchmark.parts asks for: forward, one image, a batch; texts are encoded beforehand."""
    network = network_lib.build(config.model.to_dict())
    shardings = sharding.state_shardings(mesh, {"params": network.shapes})["params"]
    params = jax.jit(network.init, out_shardings=shardings)(jax.random.key(config.seed))
    size, shape = config.data.batch_size, (config.data.batch_size, *image_sides(config.data.image_size), 3)
    rows = sharding.batch_sharding(mesh)
    contexts, null = any_contexts(config)
    parts = config.benchmark.parts.split(",")
    if "forward" in parts:
        draw = jax.jit(lambda: jax.random.normal(jax.random.key(1), shape), out_shardings=rows)
        times = jax.jit(lambda: jax.random.uniform(jax.random.key(2), (size,)), out_shardings=rows)
        given = {"context": contexts(size)}
        if config.model.class_token:
            given["class_token"] = np.zeros((size, config.model.class_token), np.float32)
        placed = sharding.place_everywhere(mesh, given)
        inputs = draw(), times(), placed.pop("context"), placed
        arguments = (jax.tree.map(lambda where: where.spec, shardings), *[sharding.BATCH] * 4)

        def output(params: Any, images: jax.Array, t: jax.Array, context: jax.Array, more: Any) -> jax.Array:
            return network.apply(params, images, t, context, **more)[0]

        forward = jax.jit(sharding.each_device(output, mesh, arguments, sharding.BATCH), out_shardings=rows)
        arithmetic = flops.forward_total(config.model, config.data.image_size) * size
        add("forward", timed(lambda: forward(params, *inputs), config.benchmark), size, arithmetic)
    if "sample" not in parts:
        return
    denoiser = generate.make_denoiser(config).with_anything()
    generator = generate.Generator(denoiser, mesh)
    sampling = Guide(config.sample, denoiser, load_other(config, mesh))(Sampling.of(config), lambda name: params)
    few = ml_collections.ConfigDict({"warmup": 1, "repeats": min(5, config.benchmark.repeats)})
    counts = {
        "sample one image": 1,
        f"sample one image on each of {mesh.size} devices": mesh.size,
        f"sample {config.sample.batch_size}": config.sample.batch_size,
    }
    for name, count in counts.items():
        if count == mesh.size == 1 and name != "sample one image":
            continue
        copies = generator.copies(count, sampling)
        filled = generator.filled(count, copies)
        request = {"index": np.arange(filled, dtype=np.int32), "context": contexts(filled)}
        repeated = {key: np.repeat(values, copies, axis=0) for key, values in request.items()}
        placed = sharding.place_everywhere(mesh, repeated)
        sample = functools.partial(generator.draw, params, placed, null, sampling, copies)
        add(name, timed(sample, few), count, flops.sampling(config) * count)


def time_inception(config: ml_collections.ConfigDict, mesh: Mesh, add: Callable[..., None]) -> None:
    """Add a row for the Inception network on config.evaluate.batch_size images, with arbitrary weights."""
    apply, shapes = inception.make_apply(mesh)
    whole, rows = sharding.replicated(mesh), sharding.batch_sharding(mesh)
    params = jax.jit(lambda: jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes), out_shardings=whole)()
    size = -(-config.evaluate.batch_size // mesh.size) * mesh.size
    shape = (size, *image_sides(config.data.image_size), 3)
    images = jax.jit(lambda: jax.random.bits(jax.random.key(0), shape, jnp.uint8), out_shardings=rows)()
    add("inception", timed(lambda: apply(params, images), config.benchmark), size)


def any_contexts(config: ml_collections.ConfigDict) -> tuple[Callable[[int], np.ndarray], np.ndarray]:
    """Return a function that makes any number of labels or text features, and the condition that means none."""
    model = config.model
    if not model.text_width:
        return lambda count: even_labels(count, range(model.num_classes)), np.asarray(model.num_classes, np.int32)
    shape = (model.text_length, model.text_width)
    return lambda count: np.ones((count, *shape), ml_dtypes.bfloat16), np.zeros(shape, ml_dtypes.bfloat16)


def time_input(
    config: ml_collections.ConfigDict,
    mesh: Mesh,
    source: sources.Source,
    condition: Condition,
    add: Callable[..., None],
) -> None:
    """Add a row for a batch of the configured source: reading, decoding and placing it on the devices."""
    batches = open_batches(config, mesh, source, condition)

    def read() -> Any:
        batch = next(batches)
        return sharding.place_batch(mesh, {name: batch[name] for name in ("image", *condition.inputs)})

    try:
        # Batches that the workers had finished before the clock started must not count.
        ready = ml_collections.ConfigDict(
            {"warmup": config.benchmark.warmup + 3 * config.data.num_workers + 4, "repeats": config.benchmark.repeats}
        )
        add("input batch", timed(read, ready), config.data.batch_size)
    finally:
        batches.close()


def input_per_core(
    config: ml_collections.ConfigDict, source: sources.Source, step: Row | None, devices: int
) -> dict[str, Any]:
    """Measure one core's images per second and the cores that a device needs; with PyTorch's DataLoader if asked."""
    sides, fast = image_sides(config.data.image_size), config.data.fast_crop
    rate = comparison.images_per_core_second(source, sides, fast)
    values: dict[str, Any] = {"images_per_core_second": rate, "fast_crop": fast}
    if step is not None:
        values["cores_per_device"] = step["images_per_second"] / devices / rate
    if "torch" in config.benchmark.parts.split(","):
        values["against_torch"] = comparison.against_torch(source, sides, fast)
    return values


def describe_input(values: dict[str, Any]) -> str:
    text = f"a core reads {values['images_per_core_second']:.4g} images/s"
    if "cores_per_device" in values:
        text += f"; {values['cores_per_device']:.2g} cores keep a device busy"
    if "against_torch" in values:
        rates = values["against_torch"]
        text += (
            f"; in batches, with one worker, {rates['deco_jax']:.4g} per core second, PyTorch's DataLoader "
            f"{rates['torch']:.4g}: {rates['ratio']:.2f} x"
        )
    return text


def random_batch(config: ml_collections.ConfigDict, mesh: Mesh, condition: Condition) -> dict[str, jax.Array]:
    """Make random uint8 images on the devices, and zeros for labels, tokens or features."""
    size = config.data.batch_size
    shape = (size, *image_sides(config.data.image_size), 3)

    def make() -> dict[str, jax.Array]:
        rest = {name: jnp.zeros((size, *inner), dtype) for name, (inner, dtype) in condition.inputs.items()}
        return {"image": jax.random.bits(jax.random.key(config.seed), shape, jnp.uint8), **rest}

    return jax.jit(make, out_shardings=sharding.batch_sharding(mesh))()


def timed(run: Callable[[], Any], settings: ml_collections.ConfigDict) -> list[float]:
    """Time settings.repeats runs, waiting for each, after settings.warmup untimed ones; return seconds."""
    for _ in range(settings.warmup):
        jax.block_until_ready(run())
    seconds = []
    for _ in range(settings.repeats):
        began = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - began)
    return seconds


def row(seconds: list[float], images: int, arithmetic: float, peak: float | None) -> Row:
    """Return the figures of one timed thing.

    Args:
        images: per run; 0: images per second make no sense.
        arithmetic: FLOPs per run on all devices; 0: not counted.
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
    """Return a row of the table."""
    seconds = values["seconds"]
    text = f"{name:<18}" + "".join(f"{seconds[key]:>10.4g}" for key in ("median", "min", "max"))
    text += f"{values['images_per_second']:>11.4g}" if "images_per_second" in values else " " * 11
    text += f"{values['tflop_per_second']:>10.4g}" if "tflop_per_second" in values else " " * 10
    return (text + (f"{values['share_of_peak']:>9.1%}" if "share_of_peak" in values else "")).rstrip()
