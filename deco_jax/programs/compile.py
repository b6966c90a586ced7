"""--mode=compile: compile the training step for a machine one may not have, and say whether it fits. Runs nothing.

--topology=v5e:16x16   a TPU slice, by libtpu's compiler; no TPU is needed
--topology=cpu:8       that many devices made of this CPU: shardings and memory in outline
(none)                 this machine's own devices
"""

from __future__ import annotations

import math
import os
import pathlib
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from jax.sharding import Mesh

from deco_jax import flops
from deco_jax.conditioning.condition import Condition, abstract_condition
from deco_jax.data.transforms import image_sides
from deco_jax.errors import UserError
from deco_jax.method.optimizer import make_optimizer
from deco_jax.programs.train import abstract_networks, lower_train_step
from deco_jax.run import hardware, monitor, sharding
from deco_jax.run.state import State, state_shapes
from deco_jax.run.workdir import make_workdir
from deco_jax.run.writer import write_json

# A parameter of up to this size may stay whole on every device.
REPLICATED_LIMIT = 10**6


def compile_step(config: ml_collections.ConfigDict, workdir: str, topology: str = "") -> None:
    """Print and write WORKDIR/compile.json; exit status 1 if the step doesn't fit into a device's memory."""
    devices = topology_devices(topology)
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, devices)
    sharding.check_batch(mesh, config.data.batch_size, "config.data.batch_size", config.optimizer.accumulate_steps)
    make_workdir(pathlib.Path(workdir))
    print(f"compiling the training step for {mesh.size} x {devices[0].device_kind} ...", flush=True)
    report = compile_report(config, mesh)
    report["topology"] = topology or "this machine"
    path = pathlib.Path(workdir) / "compile.json"
    write_json(path, report)
    print(describe(report), flush=True)
    print(f"wrote {path}", flush=True)
    if report["fits"] is False:
        raise SystemExit(1)


def topology_devices(topology: str) -> list[jax.Device]:
    """The devices of a topology; must come before anything that starts JAX's own devices.

    Raises:
        UserError: the name is none, or libtpu is missing.
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
    cores = 1 if kind in ("v5litepod", "v6e") else 2  # the older generations are named by their cores
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no chip is touched, so it does not matter who holds one
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
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
    except Exception as error:  # libtpu answers with runtime errors of its own
        raise UserError(f"--topology={topology} is not known to libtpu: {str(error).splitlines()[0][:200]}") from error


def compile_report(config: ml_collections.ConfigDict, mesh: Mesh) -> dict[str, Any]:
    """Compile the training step on a mesh and measure what can be measured without running it.

    Returns:
        bytes a device (`parameters`, `optimizer`, `state`; `arguments`, `temporaries`, `peak` by the compiler),
        seconds, FLOPs, `replicated` (parameters above REPLICATED_LIMIT that every device keeps), `fits`, `advice`.
    """
    condition = abstract_condition(config, mesh)
    networks, observe, frozen = abstract_networks(config, mesh, condition)
    optimizer = make_optimizer(config.optimizer)
    state = state_shapes(networks, optimizer, mesh)
    batch = batch_shapes(config, mesh, condition)
    device = mesh.devices.flat[0]
    chip = hardware.chip_of(device)
    memory = device_memory(device, mesh)
    report: dict[str, Any] = {
        "model": f"{config.model.name} {networks['denoiser'].num_params:,}",
        "image_size": list(image_sides(config.data.image_size)),
        "device_kind": device.device_kind,
        "chip": chip.name if chip else None,
        "devices": mesh.size,
        "mesh": dict(mesh.shape),
        "batch_size": config.data.batch_size,
        "batch_per_device": config.data.batch_size / mesh.size,
        "accumulate_steps": config.optimizer.accumulate_steps,
        "remat": config.model.remat,
        "dtype": config.model.dtype,
        "teacher": "teacher" in frozen,
        "text_encoder": bool(frozen.get("encoder")),
        "flops_per_step": flops.training(config) * config.data.batch_size,
        "flops_per_image": flops.training(config),
        "bytes": {
            "parameters": bytes_a_device(state["params"]),
            "average": bytes_a_device(state["ema"]),
            "optimizer": bytes_a_device(state["opt_state"]),
            "state": bytes_a_device(state),
            "teacher": bytes_a_device(frozen.get("teacher", {})),
            "text_encoder": bytes_a_device(frozen.get("encoder", {})),
            "batch": bytes_a_device(batch),
        },
        "memory": memory,
    }
    began = time.monotonic()
    lowered = lower_train_step(networks, optimizer, config, observe, mesh, state, batch, frozen)
    report["seconds_to_lower"] = round(time.monotonic() - began, 2)
    began = time.monotonic()
    try:
        compiled = lowered.compile()
    except Exception as error:  # the TPU compiler refuses a program that doesn't fit
        if "RESOURCE_EXHAUSTED" not in str(error) and "memory" not in str(error).lower():
            raise
        used = re.search(r"Used ([\d.]+)([KMG]) of", str(error))
        report["compiler_says"] = str(error)[:500]
        peak = float(used[1]) * {"K": 2**10, "M": 2**20, "G": 2**30}[used[2]] if used else None
        report["bytes"] |= {"arguments": None, "temporaries": None, "peak": peak}
        report["replicated"] = None
    else:
        report["bytes"] |= monitor.program_bytes(compiled)
        report["replicated"] = replicated(compiled.input_shardings[0][0], state)
    report["seconds_to_compile"] = round(time.monotonic() - began, 2)
    peak = report["bytes"]["peak"]
    if report["replicated"] is None:
        report["fits"] = False
    else:
        report["fits"] = None if memory is None else peak <= memory
    report["advice"] = advice(config, mesh, report) if report["fits"] is False else []
    return report


def batch_shapes(
    config: ml_collections.ConfigDict, mesh: Mesh, condition: Condition
) -> dict[str, jax.ShapeDtypeStruct]:
    """A global batch as ShapeDtypeStructs with shardings."""
    samples = {"image": ((*image_sides(config.data.image_size), 3), jnp.uint8), **condition.inputs}
    size, placed = config.data.batch_size, sharding.batch_sharding(mesh)
    return {
        name: jax.ShapeDtypeStruct((size, *shape), dtype, sharding=placed) for name, (shape, dtype) in samples.items()
    }


def bytes_a_device(tree: Any) -> int:
    """Bytes that a device holds of arrays (or their shapes) with shardings."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def device_memory(device: jax.Device, mesh: Mesh) -> float | None:
    """Bytes that a device can hold; None if unknown, as for a CPU."""
    chip = hardware.chip_of(device)
    try:
        stats = device.memory_stats() or {}
    except Exception:  # a device of a topology has no memory to ask about
        stats = {}
    if "bytes_limit" in stats:
        return float(stats["bytes_limit"])
    if chip is None:
        return None
    # A v4 chip shows as two devices, which share its memory.
    places = {tuple(device.coords) for device in mesh.devices.flat if hasattr(device, "coords")}
    return chip.memory * (len(places) or mesh.size) / mesh.size


def replicated(shardings: State, state: State) -> list[str]:
    """Parameters larger than REPLICATED_LIMIT that the compiled program wants whole on every device."""
    found = []
    placed = jax.tree.leaves(shardings["params"])
    for (path, leaf), where in zip(jax.tree_util.tree_leaves_with_path(state["params"]), placed, strict=True):
        size = leaf.size * leaf.dtype.itemsize
        if size > REPLICATED_LIMIT and where.is_fully_replicated:
            found.append(f"{sharding.path_name(path)} {leaf.shape}")
    return found


def advice(config: ml_collections.ConfigDict, mesh: Mesh, report: dict[str, Any]) -> list[str]:
    """What to change so that the step fits, the cheapest first."""
    advised, size, parts = [], report["bytes"], config.optimizer.accumulate_steps
    rows = config.data.batch_size // mesh.size
    if mesh.shape["data"] > 1 and size["state"] > 0.25 * report["memory"]:
        advised.append(
            f"split the state ({size['state'] / 2**30:.1f} GiB a device) over more devices: "
            f"config.mesh.fsdp={min(mesh.size, mesh.shape['fsdp'] * 8)} config.mesh.data=-1"
        )
    stronger = {"none": "dots", "dots": "full"}.get(config.model.remat)
    if stronger:
        advised.append(f"keep fewer activations: config.model.remat={stronger}")
    if rows // parts > 1:
        halves = parts * 2
        while rows % halves and halves < rows:
            halves += 1
        advised.append(f"work through the batch in more parts: config.optimizer.accumulate_steps={halves}")
        advised.append(f"a smaller batch: config.data.batch_size={max(mesh.size, config.data.batch_size // 2)}")
    if config.model.dtype == "float32":
        advised.append("compute in half the bytes: config.model.dtype=bfloat16")
    return advised or ["more devices, or a smaller model"]


def describe(report: dict[str, Any]) -> str:
    """The report as lines for people."""
    gib = {name: "?" if value is None else f"{value / 2**30:.2f}" for name, value in report["bytes"].items()}
    mesh = " x ".join(f"{name} {size}" for name, size in report["mesh"].items())
    lines = [
        f"{report['model']} parameters at {report['image_size'][0]}x{report['image_size'][1]}, {report['dtype']}, "
        f"remat {report['remat']}, batch {report['batch_size']} ({report['batch_per_device']:g} a device)",
        f"mesh        {mesh} of {report['device_kind']}",
        f"compiling   {report['seconds_to_compile']} s",
        f"arithmetic  {report['flops_per_step'] / 1e12:.4g} TFLOP a step, "
        f"{report['flops_per_image'] / 1e9:.4g} GFLOP an image"
        + (", the teacher included" if report["teacher"] else "")
        + (", the text encoder included" if report["text_encoder"] else ""),
        f"GiB a device: parameters {gib['parameters']}, average {gib['average']}, optimizer {gib['optimizer']}, "
        f"arguments {gib['arguments']}, temporaries {gib['temporaries']}, peak {gib['peak']}",
    ]
    if report["replicated"]:
        whole = ", ".join(report["replicated"][:5]) + (" ..." if len(report["replicated"]) > 5 else "")
        why = "config.mesh.fsdp is 1" if report["mesh"]["fsdp"] == 1 else "no sharding rule splits them"
        lines.append(f"kept whole on every device, {why}: {whole}")
    if report["fits"] is None:
        lines.append("memory of this device is not known: compare the peak with yours")
    else:
        verdict = "fits" if report["fits"] else "does NOT fit"
        lines.append(f"it {verdict} in the {report['memory'] / 2**30:.2f} GiB of a {report['device_kind']}")
    return "\n".join(lines + [f"  - {line}" for line in report["advice"]])
