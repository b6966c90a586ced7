"""--mode=compile: compiles a program, also for a machine you don't have; says whether it fits and how fast it would be.

Nothing is run. The program is the training step, the sampler (--what=sample) or the Inception network
(--what=evaluate).

--topology=v5e:16x16   a TPU slice, or config.mesh.slices of them, by libtpu's compiler; no TPU is needed
--topology=cpu:8       that many devices simulated on this CPU: shardings and approximate memory
(none)                 this machine's own devices
"""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh

from deco_jax import flops
from deco_jax.conditioning.condition import abstract_condition
from deco_jax.data.transforms import image_sides
from deco_jax.errors import UserError, reason
from deco_jax.method.lora import BASE
from deco_jax.method.objective import make_method
from deco_jax.method.optimizer import make_optimizer
from deco_jax.method.training import abstract_networks, batch_shapes, lower_train_step
from deco_jax.models import inception
from deco_jax.models import network as network_lib
from deco_jax.programs.benchmark import any_contexts
from deco_jax.programs.search import search_settings, with_settings
from deco_jax.run import estimate as estimate_lib
from deco_jax.run import hardware, monitor, sharding, storage
from deco_jax.run import program as program_lib
from deco_jax.run.choices import AUTO, Refused, compile_or_refused, policies
from deco_jax.run.hardware import device_memory
from deco_jax.run.state import state_shapes
from deco_jax.run.workdir import make_workdir
from deco_jax.run.writer import write_json
from deco_jax.sampling import generate
from deco_jax.sampling.settings import Sampling
from deco_jax.sampling.weaker import Guide

# Parameters up to this size may stay whole on every device.
REPLICATED_LIMIT = 10**6


def compile_program(
    config: ml_collections.ConfigDict, workdir: str, topology: str = "", what: str = "train", search: bool = False
) -> None:
    """Print a report and write WORKDIR/compile.json; exit status 1 if the program doesn't fit in a device's memory.

    Args:
        what: "train" (the step), "sample" (the sampler), or "evaluate" (the Inception network).
        search: try different settings of the training step instead; see `search.py`.
    """
    devices = topology_devices(topology, config.mesh.slices)
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, devices, config.mesh.slices)
    check_batch(config, mesh, what)
    make_workdir(storage.path(workdir))
    # The report names source lines; a program from JAX's cache may name those of an earlier version of the code.
    jax.config.update("jax_compilation_cache_include_metadata_in_key", True)
    if search:
        return search_settings(config, storage.path(workdir), devices, topology or "this machine", compile_report)
    print(f"compiling {WHAT[what]} for {mesh.size} x {devices[0].device_kind} ...", flush=True)
    report = compile_report(config, mesh, what)
    report["topology"] = topology or "this machine"
    path = storage.path(workdir) / "compile.json"
    write_json(path, report)
    print(describe(report), flush=True)
    print(f"wrote {path}", flush=True)
    if report["fits"] is False:
        raise SystemExit(1)


def check_batch(config: ml_collections.ConfigDict, mesh: Mesh, what: str) -> None:
    """Raise UserError if the batch doesn't divide over the mesh; samples and evaluations are padded until it does."""
    if what == "train":
        parts = config.optimizer.accumulate_steps
        sharding.check_batch(mesh, config.data.batch_size, "config.data.batch_size", parts)


def topology_devices(topology: str, slices: int = 1) -> list[jax.Device]:
    """Return the devices of a topology. Call it before anything that starts JAX's own devices.

    Args:
        slices: number of TPU slices of that topology.

    Raises:
        UserError: there is no such topology, or libtpu is missing.
    """
    if not topology:
        return jax.devices()
    match = re.fullmatch(r"(cpu):(\d+)|(v\d\w*):(\d+(?:x\d+)*)", topology)
    if not match:
        raise UserError(f"--topology={topology} is not a topology; write v5e:4x4, v5p:2x2x2, v6e:4x4 or cpu:8")
    jax.config.update("jax_platforms", "cpu")
    if match[1]:
        jax.config.update("jax_num_cpu_devices", int(match[2]))
        return jax.devices()
    chips = math.prod(int(side) for side in match[4].split("x"))
    kind = {"v5e": "v5litepod", "v6e": "v6e"}.get(match[3], match[3])
    cores = 1 if kind in ("v5litepod", "v6e") else 2  # older generations are named after their number of cores
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no chip is used, so other processes may hold them
        "TPU_ACCELERATOR_TYPE": f"{kind}-{cores * chips}",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
    }.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    try:
        import libtpu  # noqa: F401
    except ImportError as error:
        raise UserError(f'--topology={topology} needs libtpu\'s compiler: pip install "jax[tpu]"') from error
    try:
        several = {"num_slices": slices} if slices > 1 else {}
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology, **several).devices)
    except Exception as error:  # libtpu raises runtime errors of its own
        raise UserError(f"--topology={topology} is not known to libtpu: {reason(error, 200)}") from error


class Lowered(NamedTuple):
    """A program to compile, and what is known about it beforehand."""

    program: jax.stages.Lowered
    batch_size: int  # images per run
    flops: float | None  # per run, on all devices together
    bytes: dict[str, int]  # on a device, by kind
    params: Any = None  # shapes and shardings of the trained parameters, the program's first argument
    notes: Mapping[str, Any] = MappingProxyType({})  # more entries of the report


def lower_training(config: ml_collections.ConfigDict, mesh: Mesh) -> Lowered:
    """Lower the training step, from shapes alone."""
    condition = abstract_condition(config, mesh)
    networks, observe, frozen = abstract_networks(config, mesh, condition)
    optimizer = make_optimizer(config.optimizer)
    method = make_method(config)
    state = state_shapes(networks, optimizer, mesh, method.averages, method.measured)
    batch = batch_shapes(config, mesh, condition)
    held = {
        "parameters": state["params"],
        "average": state["averages"],
        "optimizer": state["opt_state"],
        "state": state,
        **({"frozen": frozen[BASE]} if BASE in frozen else {}),
        "teacher": frozen.get("teacher", {}),
        "text_encoder": frozen.get("encoder", {}),
        "batch": batch,
    }
    return Lowered(
        lower_train_step(networks, optimizer, config, observe, mesh, state, batch, frozen),
        config.data.batch_size,
        flops.training(config) * config.data.batch_size,
        {name: bytes_per_device(tree) for name, tree in held.items()},
        state["params"],
        {
            "accumulate_steps": config.optimizer.accumulate_steps,
            "teacher": "teacher" in frozen,
            "text_encoder": bool(frozen.get("encoder")),
        },
    )


def lower_sampling(config: ml_collections.ConfigDict, mesh: Mesh) -> Lowered:
    """Lower the whole sampler of config.sample for one batch; texts are encoded beforehand."""
    network = network_lib.build(config.model.to_dict())
    params = sharding.placed_shapes(mesh, {"params": network.shapes})["params"]
    contexts, null = any_contexts(config)
    rows, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)
    none = jax.ShapeDtypeStruct(null.shape, null.dtype, sharding=whole)
    if config.sample.guidance_model:
        raise UserError(
            "config.sample.guidance_model names a checkpoint, and compiling doesn't read any; leave it empty, or set "
            "config.sample.guidance_average=ema for a weaker model of the same size"
        )
    denoiser = generate.make_denoiser(config).with_anything()
    generator = generate.Generator(denoiser, mesh)
    sampling = Guide(config.sample, denoiser, None)(Sampling.of(config), lambda name: params)
    copies = generator.copies(config.sample.batch_size, sampling)
    size = generator.filled(config.sample.batch_size, copies)
    batch: dict[str, Any] = {
        name: jax.ShapeDtypeStruct((copies * size, *array.shape[1:]), array.dtype, sharding=rows)
        for name, array in {"index": np.arange(1, dtype=np.int32), "context": contexts(1)}.items()
    }
    held = {name: bytes_per_device(tree) for name, tree in {"parameters": params, "batch": batch}.items()}
    program = generator.lower(params, batch, none, sampling, copies)
    return Lowered(program, size, flops.sampling(config) * size, held, params)


def lower_evaluation(config: ml_collections.ConfigDict, mesh: Mesh) -> Lowered:
    """Lower the Inception network for a batch of images of config.data's size."""
    apply, shapes = inception.make_apply(mesh)
    whole, rows = sharding.replicated(mesh), sharding.batch_sharding(mesh)
    params = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=whole), shapes)
    size = -(-config.evaluate.batch_size // mesh.size) * mesh.size
    shape = (size, *image_sides(config.data.image_size), 3)
    images = jax.ShapeDtypeStruct(shape, jnp.uint8, sharding=rows)
    program = apply.lower(params, images)
    costs: Any = program.cost_analysis() or {}  # it has no loops, so XLA's count is complete
    held = {name: bytes_per_device(tree) for name, tree in {"parameters": params, "batch": images}.items()}
    return Lowered(program, size, costs.get("flops"), held)


LOWER = {"train": lower_training, "sample": lower_sampling, "evaluate": lower_evaluation}
WHAT = {"train": "the training step", "sample": "the sampler", "evaluate": "the Inception network"}


def compile_report(config: ml_collections.ConfigDict, mesh: Mesh, what: str = "train") -> dict[str, Any]:
    """Compile a program on a mesh and report what can be known without running it.

    Returns:
        "bytes" per device (by name, and the compiler's "arguments", "temporaries" and "peak"), seconds, FLOPs,
        "replicated" (parameters above REPLICATED_LIMIT that every device keeps whole), "fits", "advice", and
        "estimate", see `run.estimate.estimate`. Figures are None if the compiler gave up.
    """
    device = mesh.devices.flat[0]
    chip = hardware.chip_of(device)
    memory = device_memory(device, mesh)
    if config.model.remat == AUTO:  # choose it as training does
        found: list[dict[str, Any]] = []
        for policy in policies(memory) if what == "train" else ("none",):
            found.append(compile_report(with_settings(config, {"model.remat": policy}), mesh, what))
            if found[-1]["fits"] is not False and not cycles_of(found[-1]):
                break
        return min(found, key=lambda each: (each["fits"] is False, cycles_of(each) or -found.index(each)))
    model = config.model
    began = time.monotonic()
    lowered = LOWER[what](config, mesh)
    report: dict[str, Any] = {
        "what": what,
        "model": "Inception" if what == "evaluate" else f"{model.name} {num_params(config):,} parameters",
        "image_size": list(image_sides(config.data.image_size)),
        "device_kind": device.device_kind,
        "chip": chip.name if chip else None,
        "devices": mesh.size,
        "mesh": dict(mesh.shape),
        "slices": config.mesh.slices,
        "batch_size": lowered.batch_size,
        "batch_per_device": lowered.batch_size / mesh.size,
        "remat": model.remat,
        "dtype": "float32" if what == "evaluate" else model.dtype,
        **lowered.notes,
        "flops_per_step": lowered.flops,
        "flops_per_image": lowered.flops and lowered.flops / lowered.batch_size,
        "bytes": dict(lowered.bytes),
        "memory": memory,
        "replicated": None,
        "estimate": None,
        "seconds_to_lower": round(time.monotonic() - began, 2),
    }
    began = time.monotonic()
    compiled = compile_or_refused(lowered.program)
    if isinstance(compiled, Refused):
        report["compiler_says"] = compiled.message
        report["bytes"] |= {"arguments": None, "temporaries": None, "peak": compiled.peak}
        report["fits"] = False
    else:
        report["bytes"] |= monitor.program_bytes(compiled)
        report["fits"] = None if memory is None else report["bytes"]["peak"] <= memory
        if lowered.params is not None:
            placed: Any = compiled.input_shardings[0][0]
            report["replicated"] = replicated(placed["params"] if what == "train" else placed, lowered.params)
        text = program_lib.parse(compiled.as_text() or "")
        report["estimate"] = estimate_lib.estimate(text, chip, lowered.flops or 0.0, mesh.size, config.mesh.slices)
    report["seconds_to_compile"] = round(time.monotonic() - began, 2)
    report["advice"] = advice(config, mesh, report) if report["fits"] is False and what == "train" else []
    return report


def cycles_of(report: Mapping[str, Any]) -> int | None:
    """Return XLA's estimate for a report's program; None if it has none."""
    return (report["estimate"] or {}).get("cycles")


def num_params(config: ml_collections.ConfigDict) -> int:
    return network_lib.build(config.model).num_params


def bytes_per_device(tree: Any) -> int:
    """Return how many bytes of sharded arrays (or their shapes) a device holds."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def replicated(shardings: Any, params: Any) -> list[str]:
    """Return the parameters above REPLICATED_LIMIT that the compiled program keeps whole on every device."""
    found = []
    placed = jax.tree.leaves(shardings)
    for (path, leaf), where in zip(jax.tree_util.tree_leaves_with_path(params), placed, strict=True):
        size = leaf.size * leaf.dtype.itemsize
        if size > REPLICATED_LIMIT and where.is_fully_replicated:
            found.append(f"{sharding.path_name(path)} {leaf.shape}")
    return found


def advice(config: ml_collections.ConfigDict, mesh: Mesh, report: dict[str, Any]) -> list[str]:
    """Return changes that could make the step fit, the cheapest first."""
    advised, size, parts = [], report["bytes"], config.optimizer.accumulate_steps
    rows = config.data.batch_size // mesh.size
    if mesh.shape["data"] > 1 and size["state"] > 0.25 * report["memory"]:
        advised.append(
            f"split the state ({size['state'] / 2**30:.1f} GiB per device) over more devices: "
            f"config.mesh.fsdp={min(mesh.size // config.mesh.slices, mesh.shape['fsdp'] * 8)} config.mesh.data=-1"
        )
    stronger = {"none": "dots", "dots": "attention", "attention": "full"}.get(config.model.remat)
    if stronger:
        advised.append(f"keep fewer activations: config.model.remat={stronger}")
    if rows // parts > 1:
        halves = parts * 2
        while rows % halves and halves < rows:
            halves += 1
        advised.append(f"split the batch into more parts: config.optimizer.accumulate_steps={halves}")
        advised.append(f"use a smaller batch: config.data.batch_size={max(mesh.size, config.data.batch_size // 2)}")
    if config.model.dtype == "float32":
        advised.append("compute with half the bytes: config.model.dtype=bfloat16")
    return advised or ["use more devices, or a smaller model"]


def describe(report: dict[str, Any]) -> str:
    """Return the report as readable lines."""
    gib = {name: "?" if value is None else f"{value / 2**30:.2f}" for name, value in report["bytes"].items()}
    mesh = " x ".join(f"{name} {size}" for name, size in report["mesh"].items())
    training = report["what"] == "train"
    run = "step" if training else "batch"
    lines = [
        f"{report['model']} at {report['image_size'][0]}x{report['image_size'][1]}, {report['dtype']}, "
        + (f"remat {report['remat']}, " if training else "")
        + f"batch {report['batch_size']} ({report['batch_per_device']:g} per device)",
        f"mesh        {mesh} of {report['device_kind']}"
        + (f" in {report['slices']} slices" if report["slices"] > 1 else ""),
        f"compiling   {report['seconds_to_compile']} s",
    ]
    if report["flops_per_step"]:
        lines.append(
            f"arithmetic  {report['flops_per_step'] / 1e12:.4g} TFLOP per {run}, "
            f"{report['flops_per_image'] / 1e9:.4g} GFLOP per image"
            + (", including the teacher" if report.get("teacher") else "")
            + (", including the text encoder" if report.get("text_encoder") else "")
        )
    names = ("frozen", "parameters", "average", "optimizer", "arguments", "temporaries", "peak")
    lines.append("GiB per device: " + ", ".join(f"{name} {gib[name]}" for name in names if name in gib))
    if report["estimate"]:
        lines += estimate_lib.words(report["estimate"], report["chip"])
    if report["replicated"]:
        whole = ", ".join(report["replicated"][:5]) + (" ..." if len(report["replicated"]) > 5 else "")
        why = "config.mesh.fsdp is 1" if report["mesh"]["fsdp"] == 1 else "no sharding rule splits them"
        lines.append(f"kept whole on every device, {why}: {whole}")
    if report["fits"] is None:
        lines.append("this device doesn't report its memory: compare the peak with what it has")
    else:
        verdict = "fits" if report["fits"] else "does NOT fit"
        lines.append(f"it {verdict} in the {report['memory'] / 2**30:.2f} GiB of a {report['device_kind']}")
    return "\n".join(lines + [f"  - {line}" for line in report["advice"]])
