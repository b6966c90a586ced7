"""What a device is told to do: the compiled step and sampler of eight devices, read instead of run.

Equal losses don't show it: a program in which every device works through the whole batch has them too.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
import re
import subprocess
import sys

import pytest

from deco_jax.run import program, slices
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
    "slices": {"mesh": (2, 2), "slices": 2},
}

PROGRAM = """
import importlib, json, pathlib, sys
import jax
from deco_jax.conditioning.condition import abstract_condition
from deco_jax.method.optimizer import make_optimizer
from deco_jax.programs import compile as compile_lib
from deco_jax.method import training
from deco_jax.run import sharding
from deco_jax.run.state import state_shapes
from deco_jax.sampling import generate
from deco_jax.sampling.settings import Sampling

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
    mesh = sharding.make_mesh(*case["mesh"], slices=case.get("slices", 1))
    condition = abstract_condition(config, mesh)
    networks, observe, frozen = training.abstract_networks(config, mesh, condition)
    optimizer = make_optimizer(config.optimizer)
    state = state_shapes(networks, optimizer, mesh)
    batch = compile_lib.batch_shapes(config, mesh, condition)
    step = training.lower_train_step(networks, optimizer, config, observe, mesh, state, batch, frozen)
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
        generator = generate.Generator(generate.make_denoiser(config), mesh)
        placed = sharding.batch_sharding(mesh)
        request = {
            key: jax.ShapeDtypeStruct((rows,), "int32", sharding=placed) for key in ("index", "context")
        }
        null = jax.ShapeDtypeStruct((), "int32")
        sampler = generator.lower(state["averages"]["ema"], request, null, Sampling.of(config))
        (folder / "sampler.hlo").write_text(sampler.compile().as_text())
        request = {key: jax.ShapeDtypeStruct((8,), "int32", sharding=placed) for key in ("index", "context")}
        for copies, file in ((1, "one_image.hlo"), (2, "shared_image.hlo")):
            sampler = generator.lower(state["averages"]["ema"], request, null, Sampling.of(config), copies)
            (folder / file).write_text(sampler.compile().as_text())
        config.model.dtype = "bfloat16"
        networks, observe, frozen = training.abstract_networks(config, mesh, condition)
        step = training.lower_train_step(networks, optimizer, config, observe, mesh, state, batch, frozen)
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


def read(folder: pathlib.Path, name: str) -> program.Program:
    return program.parse((folder / f"{name}.hlo").read_text())


def moved(one: program.Collective) -> int:
    """Bytes a step, as a ring sends a whole array around once, and an all-reduce's twice."""
    return one.bytes * one.times * (2 if one.kind == "all-reduce" else 1)


@pytest.mark.parametrize("name", [*CASES, "sampler"])
def test_no_device_holds_the_global_batch(programs, name):
    shapes = {array.shape for array, _ in program.arrays(read(programs, name)) if array.shape}
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
    inside = [one for one in program.collectives(read(programs, name)) if one.times > 1]
    assert bool(inside) == (CASES[name]["mesh"][1] > 1)
    for one in inside:
        put_in = {array.shape for array in one.arrays}
        assert put_in <= {"all-gather": held, "reduce-scatter": whole}[one.kind], one


@pytest.mark.parametrize("name", CASES)
def test_no_more_travels_than_fsdp_needs(programs, name):
    """A block's weights are gathered twice and the other ones' once, gradients added up once; frozen ones gathered
    once. What isn't split is added up over all devices, and what is over the copies. All in float32 here."""
    data, fsdp = CASES[name]["mesh"]
    data *= CASES[name].get("slices", 1)
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
    assert 0.9 * needed < sum(map(moved, program.collectives(read(programs, name)))) < 1.2 * needed


def test_only_sums_cross_from_slice_to_slice(programs):
    """Weights are gathered, and their gradients scattered, inside a slice: partitions 0 to 3, or 4 to 7."""
    parsed, crossing = read(programs, "slices"), 0.0
    for one in program.collectives(parsed):
        groups = slices.groups(one.attributes, 8)
        assert sorted(groups.ravel()) == list(range(8))
        inside = all(len({member // 4 for member in group}) == 1 for group in groups)
        assert inside or one.kind == "all-reduce", one
        if not inside:  # two slices: a device of n in a group sends its share there, and gets the other's back
            crossing += 2 * (one.bytes / (one.devices / 2)) / 2 * one.times
    (row,) = slices.crossing(parsed, 2, 8).items()
    assert row[0] == "all-reduce"
    assert row[1]["bytes"] == crossing > 0
    # Each gradient once: what is split crosses in its parts.
    held = [math.prod(p["held"]) for p in json.loads((programs / "slices.json").read_text()) if p["trained"]]
    whole = [p["shape"] == p["held"] for p in json.loads((programs / "slices.json").read_text()) if p["trained"]]
    needed = sum(4 * size / (4 if kept else 2) for size, kept in zip(held, whole, strict=True))
    assert 0.95 * needed < crossing < 1.05 * needed
    assert slices.crossing(read(programs, "data2_fsdp4"), 1, 8) == {}


def test_two_devices_share_the_halves_of_guidance(programs):
    """Neither evaluates both, and only velocities travel between them."""
    alone, shared = (read(programs, name) for name in ("one_image", "shared_image"))
    tokens = [
        {array.shape for array, _ in program.arrays(each) if array.shape[-1:] == (WIDTH,)} for each in (alone, shared)
    ]
    assert any(math.prod(shape) == 2 * TOKENS * WIDTH for shape in tokens[0])
    assert not any(math.prod(shape) == 2 * TOKENS * WIDTH for shape in tokens[1])
    travelling = [[one for one in program.collectives(each) if one.times > 1] for each in (alone, shared)]
    assert not travelling[0]
    assert {(one.kind, one.bytes) for one in travelling[1]} == {("all-gather", 2 * 32 * 32 * 3 * 4)}


def test_a_sampler_gathers_each_weight_once(programs):
    found = program.collectives(read(programs, "sampler"))
    split = [p for p in json.loads((programs / "fsdp8.json").read_text()) if p["shape"] != p["held"]]
    split = [p for p in split if p["name"].startswith("params/denoiser")]
    assert sorted(one.arrays[0].shape for one in found) == sorted(tuple(p["held"]) for p in split)
    assert {(one.kind, one.times) for one in found} == {("all-gather", 1)}


def test_weights_travel_in_the_compute_dtype(programs):
    text = (programs / "bfloat16.mlir").read_text()
    found = re.findall(r'"stablehlo\.(all_gather|reduce_scatter)".*?\) : \(tensor<([\dx]+)x(\w+)>\)', text, re.DOTALL)
    assert {kind for kind, _, _ in found} == {"all_gather", "reduce_scatter"}
    # The embedding of labels is looked up in float32.
    assert {size for _, size, dtype in found if dtype != "bf16"} <= {"11x16", "11x128"}
    assert sum(dtype == "bf16" for _, _, dtype in found) > 10


INCEPTION = """
import sys
from configs import imagenet256
from deco_jax.programs import compile as compile_lib
from deco_jax.run import sharding

config = imagenet256.get_config("smoke")
config.evaluate.batch_size = int(sys.argv[2])
lowered = compile_lib.lower_evaluation(config, sharding.make_mesh(2, 4))
open(sys.argv[1], "w").write(lowered.program.compile().as_text())
"""


def test_inception_s_images_stay_where_they_are(tmp_path):
    """Only the features travel, to all devices; 88 images, 11 on each."""
    path = tmp_path / "inception.hlo"
    done = subprocess.run(
        [sys.executable, "-c", INCEPTION, path, str(ROWS)],
        cwd=ROOT,
        timeout=500,
        env={**os.environ, **fake_devices(8)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = program.parse(path.read_text())
    shapes = {array.shape for array, _ in program.arrays(found) if array.shape}
    assert any(shape[0] == ROWS // 8 and len(shape) == 4 for shape in shapes)
    assert not [shape for shape in shapes if shape[0] == ROWS and len(shape) > 3]
    features = ROWS * (2048 + 2023 + 1008) * 4  # pooled, spatial, class probabilities
    assert {one.kind for one in program.collectives(found)} == {"all-gather"}
    assert sum(map(moved, program.collectives(found))) <= features
