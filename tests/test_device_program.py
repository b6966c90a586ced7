"""What a device is told to do: the compiled step and sampler of eight devices, read instead of run.

Equal losses don't show it: a program in which every device works through the whole batch has them too.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from tests.helpers import ROOT, fake_devices

ROWS = 88  # a global batch of 8 x 11: no other size here is a multiple of it
TOKENS, WIDTH = 16, 128
CASES = {
    "fsdp8": {"mesh": (1, 8)},
    "data2_fsdp4": {"mesh": (2, 4)},
    "data8": {"mesh": (8, 1)},
    "text": {"mesh": (1, 8), "config": "t2i_256"},
    "teacher": {"mesh": (1, 8), "teacher": True},
    "parts": {"mesh": (2, 4), "accumulate": 11},
}

PROGRAM = """
import importlib, json, pathlib, sys
import jax
from deco_jax.conditioning.condition import abstract_condition
from deco_jax.method.optimizer import make_optimizer
from deco_jax.programs import compile as compile_lib
from deco_jax.programs import train
from deco_jax.run import sharding
from deco_jax.run.state import state_shapes
from deco_jax.sampling import generate

folder, cases, rows = pathlib.Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3])
for name, case in cases.items():
    config = importlib.import_module("configs." + case.get("config", "imagenet256")).get_config("smoke")
    config.model.width, config.model.num_heads, config.model.depth = 128, 4, 3
    config.model.unroll, config.model.remat = 1, "full"
    config.data.batch_size = rows
    config.optimizer.accumulate_steps = case.get("accumulate", 1)
    if case.get("teacher"):
        config.loss.repa_weight, config.loss.repa_layer, config.teacher.size = 0.5, 1, "S"
    config.teacher.dtype = config.text.dtype = "float32"  # a CPU gathers no bfloat16
    mesh = sharding.make_mesh(*case["mesh"])
    condition = abstract_condition(config, mesh)
    networks, observe, frozen = train.abstract_networks(config, mesh, condition)
    optimizer = make_optimizer(config.optimizer)
    state = state_shapes(networks, optimizer, mesh)
    batch = compile_lib.batch_shapes(config, mesh, condition)
    step = train.lower_train_step(networks, optimizer, config, observe, mesh, state, batch, frozen)
    (folder / f"{name}.hlo").write_text(step.compile().as_text())
    trees = {"params": state["params"], **{k: v for k, v in frozen.items() if k in ("teacher", "encoder")}}
    parameters = [
        {
            "name": sharding.path_name(path),
            "shape": leaf.shape,
            "held": leaf.sharding.shard_shape(leaf.shape),
            "trained": sharding.path_name(path).startswith("params"),
        }
        for path, leaf in jax.tree.leaves_with_path(trees)
    ]
    (folder / f"{name}.json").write_text(json.dumps(parameters))
    if name == "fsdp8":
        generator = generate.make_generator(networks["denoiser"], config, mesh)
        placed = sharding.batch_sharding(mesh)
        request = {
            key: jax.ShapeDtypeStruct((rows,), "int32", sharding=placed) for key in ("index", "context")
        }
        sampler = generator.lower(state["ema"], request, jax.ShapeDtypeStruct((), "int32"))
        (folder / "sampler.hlo").write_text(sampler.compile().as_text())
        config.model.dtype = "bfloat16"
        networks, observe, frozen = train.abstract_networks(config, mesh, condition)
        step = train.lower_train_step(networks, optimizer, config, observe, mesh, state, batch, frozen)
        (folder / "bfloat16.mlir").write_text(step.as_text())
"""


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("programs")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, folder, json.dumps(CASES), str(ROWS)],
        cwd=ROOT,
        timeout=500,
        env={**os.environ, **fake_devices(8)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return folder


class Collective(NamedTuple):
    kind: str
    shapes: list[tuple[int, ...]]  # of its results
    bytes: int  # of its results
    group: int  # devices that take part
    times: int  # in a step
    line: str

    @property
    def moved(self) -> int:
        """Bytes a step of a ring: a device sends its part of a result once around, an all-reduce's twice."""
        whole = self.bytes * (self.group if self.kind == "reduce-scatter" else 1)
        return whole * self.times * (2 if self.kind == "all-reduce" else 1)


SIZES = {"pred": 1, "u8": 1, "s8": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8, "u64": 8}
KINDS = r" (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("


def computations(text: str) -> tuple[dict[str, list[str]], str]:
    """The lines of each computation of a compiled program, and the name of the one that it starts with."""
    found: dict[str, list[str]] = {}
    entry = ""
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            lines = found[head[2]] = []
            entry = head[2] if head[1] else entry
        elif found:
            lines.append(line)
    return found, entry


def collectives(text: str) -> Iterator[Collective]:
    """All of a program, with how often a step runs each."""
    found, entry = computations(text)

    def walk(name: str, times: int) -> Iterator[Collective]:
        for line in found[name]:
            inner = times
            if " while(" in line:
                count = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
                assert count, line
                inner = times * int(count[1])
            if kind := re.search(KINDS, line):
                yield collective(kind, line, times)
                continue  # what it calls adds two numbers
            for called in re.findall(r"(?:body|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)", line):
                yield from walk(called, inner)

    return walk(entry, 1)


def collective(kind: re.Match, line: str, times: int) -> Collective:
    results = re.findall(r"(\w+)\[([\d,]*)\]", line[: kind.start()])
    shapes = [tuple(int(n) for n in size.split(",") if n) for _, size in results]
    total = sum(SIZES[dtype] * math.prod(shape) for (dtype, _), shape in zip(results, shapes, strict=True))
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
    counted = re.search(r"replica_groups=\[\d+,(\d+)\]", line)
    group = len(listed[1].split(",")) if listed else int(counted[1]) if counted else 1
    return Collective(kind[1], shapes, total, group, times, line.strip()[:300])


def test_the_reader_counts_loops():
    text = """
add (x: f32[], y: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%x, %y)
}

body (p: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %g = f32[4,8]{1,0} all-gather(%w), replica_groups=[2,4]<=[8], dimensions={1}
}

condition (p: (s32[], f32[4,8])) -> pred[] {
  ROOT %less = pred[] compare(%i, %n)
}

ENTRY main (a: f32[4,2]) -> f32[] {
  %loop = (s32[], f32[4,8]) while(%t), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  ROOT %r = (f32[], bf16[3]) all-reduce(%x, %y), replica_groups={{0,1},{2,3}}, to_apply=%add
}
"""
    loop, end = collectives(text)
    assert (loop.kind, loop.shapes, loop.times, loop.group, loop.moved) == ("all-gather", [(4, 8)], 3, 4, 384)
    assert (end.kind, end.shapes, end.times, end.group, end.moved) == ("all-reduce", [(), (3,)], 1, 2, 20)


@pytest.mark.parametrize("name", [*CASES, "sampler"])
def test_no_device_holds_the_global_batch(programs, name):
    text = (programs / f"{name}.hlo").read_text()
    shapes = {tuple(map(int, size.split(","))) for size in re.findall(r"\w+\[([\d,]+)\]", text)}
    assert (ROWS // 8, 32, 32, 3) in shapes
    # All tokens as the rows of a matrix, too.
    assert not [shape for shape in shapes if shape[0] == ROWS or (shape[0] == ROWS * TOKENS and shape[-1] >= WIDTH)]


@pytest.mark.parametrize("name", CASES)
def test_only_weights_and_their_gradients_travel_in_the_loops(programs, name):
    parameters = json.loads((programs / f"{name}.json").read_text())
    blocks = [p for p in parameters if "blocks/" in p["name"] and p["shape"] != p["held"]]
    whole, held = ({tuple(p[key][1:]) for p in blocks} for key in ("shape", "held"))
    loose = [p for p in parameters if "blocks/" not in p["name"]]
    if CASES[name].get("accumulate"):  # one loop around everything
        whole |= {tuple(p["shape"]) for p in loose}
        held |= {tuple(p["held"]) for p in loose}
    inside = [c for c in collectives((programs / f"{name}.hlo").read_text()) if c.times > 1]
    assert bool(inside) == (CASES[name]["mesh"][1] > 1)
    for one in inside:
        assert set(one.shapes) <= {"all-gather": whole, "reduce-scatter": held}[one.kind], one.line


@pytest.mark.parametrize("name", CASES)
def test_no_more_travels_than_fsdp_needs(programs, name):
    """A block's weights are gathered twice and the other ones' once, gradients added up once; frozen ones gathered
    once. What isn't split is added up over all devices, and what is over the copies. All in float32 here."""
    data, fsdp = CASES[name]["mesh"]
    parts = CASES[name].get("accumulate", 1)
    needed = 0.0
    for p in json.loads((programs / f"{name}.json").read_text()):
        size = 4 * math.prod(p["shape"])
        if p["shape"] != p["held"]:
            gathers = 2 if "blocks/" in p["name"] and p["trained"] else 1
            needed += parts * (gathers + p["trained"]) * size
            needed += 2 * size / fsdp * (data > 1) * p["trained"]
        else:
            needed += 2 * size * p["trained"]
    assert needed > 0
    moved = sum(c.moved for c in collectives((programs / f"{name}.hlo").read_text()))
    assert 0.9 * needed < moved < 1.2 * needed


def test_a_sampler_gathers_each_weight_once(programs):
    found = list(collectives((programs / "sampler.hlo").read_text()))
    split = [p for p in json.loads((programs / "fsdp8.json").read_text()) if p["shape"] != p["held"]]
    split = [p for p in split if p["name"].startswith("params/denoiser")]
    assert sorted(c.shapes[0] for c in found) == sorted(tuple(p["shape"]) for p in split)
    assert {(c.kind, c.times) for c in found} == {("all-gather", 1)}


def test_weights_travel_in_the_compute_dtype(programs):
    text = (programs / "bfloat16.mlir").read_text()
    moved = re.findall(r'"stablehlo\.(all_gather|reduce_scatter)".*?\) : \(tensor<([\dx]+)x(\w+)>\)', text, re.DOTALL)
    assert {kind for kind, _, _ in moved} == {"all_gather", "reduce_scatter"}
    # The embedding of labels is looked up in float32.
    assert {size for _, size, dtype in moved if dtype != "bf16"} <= {"11x16", "11x128"}
    assert sum(dtype == "bf16" for _, _, dtype in moved) > 10
