"""The mesh and its rules; the same losses and pictures on every mesh of eight devices."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from configs import ablation, quickstart, t2i_256
from deco_jax.errors import UserError
from deco_jax.method.optimizer import make_optimizer
from deco_jax.models import dinov2
from deco_jax.models import network as network_lib
from deco_jax.models.qwen3 import Qwen3, Sizes
from deco_jax.run import sharding
from deco_jax.run.state import initial_state
from tests.helpers import ROOT, fake_devices

# data, fsdp and parts of a step, slices: "parts" has one row a device and part; the width doesn't divide by 5.
MESHES = {
    "one": (1, 1, 1, 1),
    "data8": (8, 1, 1, 1),
    "data2_fsdp4": (2, 4, 1, 1),
    "fsdp8": (1, 8, 1, 1),
    "parts": (2, 4, 5, 1),
    "fsdp5": (1, 5, 1, 1),
    "slices": (2, 2, 1, 2),
}

# In an interpreter of its own, as the number of devices is fixed when JAX starts.
PROGRAM = """
import json, pathlib, sys
import jax, numpy as np
from deco_jax.run import checkpoint, sharding
from deco_jax.conditioning.requests import class_requests, even_labels
from deco_jax.sampling import generate
from deco_jax.sampling.settings import Sampling
from deco_jax.method import training
from deco_jax.data import pipeline, sources
from deco_jax.models import network
from deco_jax.method.optimizer import make_optimizer
from deco_jax.run.state import create_state, state_shapes
from configs import quickstart

folder, meshes = pathlib.Path(sys.argv[1]), json.loads(sys.argv[2])
config = quickstart.get_config("smoke")
config.model.width, config.model.num_heads = 64, 4
config.model.num_classes = 10
config.optimizer.warmup_steps = 0
config.sample.num_images = 12
config.sample.num_steps = 5
jax.config.update("jax_default_matmul_precision", "highest")
requests = class_requests(even_labels(12, range(10)), 10)
result, finals = {}, {}
config.model.decoder_chunk = 128
for name, (data, fsdp, parts, slices) in meshes.items():
    config.optimizer.accumulate_steps = parts
    mesh = sharding.make_mesh(data, fsdp, slices=slices)
    networks, observe, _ = training.abstract_networks(config, mesh)
    optimizer = make_optimizer(config.optimizer)
    wide = {"denoiser": network.build({**config.model.to_dict(), "width": 256, "depth": 4})}
    state, held = create_state(0, wide, optimizer, mesh), {}
    for leaf in jax.tree.leaves(state):
        for shard in leaf.addressable_shards:
            held[shard.device.id] = held.get(shard.device.id, 0) + shard.data.nbytes
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    state = create_state(0, networks, optimizer, mesh)
    batches = pipeline.train_batches(sources.Digits(), image_size=(16, 16), batch_size=40, seed=0)
    place = lambda: sharding.place_batch(mesh, {k: v for k, v in next(batches).items() if k != "unreadable"})
    batch = place()
    split = len({shard.device for shard in batch["image"].addressable_shards})
    step = training.lower_train_step(networks, optimizer, config, observe, mesh, state, batch, {}).compile()
    losses = []
    for _ in range(20):
        state, metrics = step(state, batch, {})
        losses.append(float(metrics["loss"]))
        batch = place()
    batches.close()
    generator = generate.Generator(generate.make_denoiser(config), mesh)
    images = np.concatenate(list(generator.images(state["averages"]["ema"], requests, Sampling.of(config), 8)))
    np.save(folder / f"{name}.npy", images)
    few, sampling = class_requests(even_labels(12, range(10))[:3], 10), Sampling.of(config)
    drawn = list(generator.images(state["averages"]["ema"], few, sampling, 8))
    np.save(folder / f"{name}_few.npy", np.concatenate(drawn))
    copies = generator.copies(few.count, sampling)
    result[name] = {"held": list(held.values()), "total": total, "rows": split, "losses": losses, "copies": copies}
    if name == "fsdp8":
        checkpoints = checkpoint.Checkpoints(folder, 1)
        checkpoints.save(20, state, config)
        checkpoints.wait()
        checkpoints.close()
        saved = jax.tree.map(np.asarray, state)

# What 8 devices wrote between them, read onto two other meshes.
for data, fsdp in ((2, 4), (1, 1)):
    mesh = sharding.make_mesh(data, fsdp)
    checkpoints = checkpoint.Checkpoints(folder, 1)
    restored = checkpoints.restore(state_shapes(networks, optimizer, mesh), config)
    checkpoints.close()
    jax.tree.map(np.testing.assert_array_equal, saved, restored)
    shapes = state_shapes(networks, optimizer, mesh)
    assert jax.tree.all(jax.tree.map(lambda a, b: a.sharding == b.sharding, restored, shapes))
(folder / "result.json").write_text(json.dumps(result))
"""


@pytest.fixture(scope="module")
def on_eight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("eight")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, folder, json.dumps(MESHES)],
        cwd=ROOT,
        timeout=500,
        env={**os.environ, **fake_devices(8)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((folder / "result.json").read_text())
    return {
        name: {
            **result[name],
            **{key: np.load(folder / f"{name}{end}.npy") for key, end in (("images", ""), ("few", "_few"))},
        }
        for name in MESHES
    }


@pytest.mark.parametrize("name", [name for name in MESHES if name != "one"])
def test_losses_and_pictures_are_those_of_one_device(on_eight, name):
    one, many = on_eight["one"], on_eight[name]
    data, fsdp, _, slices = MESHES[name]
    assert many["rows"] == slices * data * fsdp
    np.testing.assert_allclose(many["losses"], one["losses"], rtol=1e-5)
    assert len(set(one["losses"])) == 20
    assert one["images"].shape == (12, 16, 16, 3)
    assert np.abs(many["images"].astype(int) - one["images"]).max() <= 1


@pytest.mark.parametrize("name", MESHES)
def test_few_images_share_their_devices(on_eight, name):
    """Of three images on eight devices, two devices evaluate the halves of each; the pictures are the same."""
    data, fsdp, _, slices = MESHES[name]
    assert on_eight[name]["copies"] == (2 if slices * data * fsdp == 8 else 1)
    assert on_eight[name]["few"].shape == (3, 16, 16, 3)
    assert np.abs(on_eight[name]["few"].astype(int) - on_eight["one"]["images"][:3]).max() <= 1


def test_state_is_born_split(on_eight):
    """Whole on each device over "data"; over "fsdp" split but for vectors and the pixel decoder."""
    total = on_eight["one"]["total"]
    assert on_eight["one"]["held"] == [total]
    assert on_eight["data8"]["held"] == [total] * 8
    for name, parts in (("fsdp8", 8), ("data2_fsdp4", 4)):
        held = on_eight[name]["held"]
        assert len(held) == 8
        assert len(set(held)) == 1
        assert total / parts < held[0] < total / parts * 1.05


MODELS = {
    "deco": quickstart.get_config("smoke"),
    "dit": ablation.get_config("dit-smoke"),
    "pixnerd": ablation.get_config("pixnerd-smoke"),
    "text": t2i_256.get_config("smoke"),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_leaf_has_a_rule(name, caplog):
    """Nothing is left whole for want of a rule, and where a rule splits, it is the model's width or a multiple."""
    config = MODELS[name]
    networks = {"denoiser": network_lib.build(config.model.to_dict())}
    optimizer = make_optimizer(config.optimizer)
    state = jax.eval_shape(lambda key: initial_state(key, networks, optimizer), jax.random.key(0))
    mesh = jax.sharding.AbstractMesh((2, 4), ("data", "fsdp"))
    shardings = sharding.state_shardings(mesh, state)
    assert caplog.text == ""
    parameters = jax.tree.leaves_with_path(shardings["params"])
    split = 0
    for (path, placed), leaf in zip(parameters, jax.tree.leaves(state["params"]), strict=True):
        axes = [i for i, axis in enumerate(placed.spec) if axis == "fsdp"]
        assert len(axes) <= 1, path
        if axes:
            # PixNerd's generator is wider than the model.
            assert leaf.shape[axes[0]] % config.model.width == 0 or "generator" in str(path), path
            split += leaf.size
    assert split > 0
    # Averages and moments lie where their parameters do.
    by_end = {sharding.path_name(path): placed.spec for path, placed in parameters}
    for path, placed in jax.tree.leaves_with_path({k: shardings[k] for k in ("averages", "opt_state")}):
        ends = [spec for end, spec in by_end.items() if sharding.path_name(path).endswith(end.partition("/")[2])]
        assert placed.spec in (ends or [PartitionSpec()]), path


def test_what_does_not_divide_stays_whole_and_is_named(caplog):
    mesh = jax.sharding.AbstractMesh((1, 5), ("data", "fsdp"))
    leaf = {"qkv": {"kernel": jax.ShapeDtypeStruct((2, 32, 96), np.float32)}}
    shardings = sharding.state_shardings(mesh, leaf)
    assert all(s.spec == PartitionSpec() for s in jax.tree.leaves(shardings))
    assert "qkv/kernel (2, 32, 96) does not divide over fsdp=5" in caplog.text


def test_a_parameter_without_a_rule_is_an_error():
    mesh = jax.sharding.AbstractMesh((1, 1), ("data", "fsdp"))
    with pytest.raises(UserError, match=r"no sharding rule covers the parameter odd \(3,\)"):
        sharding.state_shardings(mesh, {"odd": jax.ShapeDtypeStruct((3,), np.float32)})


def test_every_frozen_network_s_leaf_has_a_rule(caplog):
    """And its matrices are split along the width that divides, not left whole."""
    mesh = jax.sharding.AbstractMesh((1, 4), ("data", "fsdp"))
    teacher = dinov2.teacher("B", "", "bfloat16", 16).shapes
    encoder = network_lib.functional(lambda rngs: Qwen3(Sizes(vocabulary=100, depth=2), rngs=rngs)).shapes
    placed = sharding.state_shardings(mesh, {"teacher": teacher, "encoder": encoder})
    split = {sharding.path_name(path) for path, leaf in jax.tree.leaves_with_path(placed) if "fsdp" in leaf.spec}
    kernels = {
        sharding.path_name(path)
        for path, _ in jax.tree.leaves_with_path(placed)
        if path[-1].key in ("kernel", "positions", "embedding")
    }
    assert split == kernels


@pytest.mark.parametrize(
    "data, fsdp, message",
    [
        (-1, -1, "both -1"),
        (2, 1, "asks for 2 x 1 = 2 devices, but this machine has 1"),
        (-1, 3, "axis of 3 does not divide this machine's 1 devices"),
        (3, -1, "axis of 3 does not divide"),
    ],
)
def test_meshes_that_cannot_be(data, fsdp, message):
    with pytest.raises(UserError, match=message):
        sharding.make_mesh(data, fsdp, jax.devices()[:1])


@dataclasses.dataclass(frozen=True)
class Device:
    """A device as JAX shows those of several slices; `jax.make_mesh` asks for no more of a CPU's."""

    id: int
    slice_index: int
    process_index: int = 0
    platform: str = "cpu"
    device_kind: str = "cpu"


def test_weights_stay_in_their_slice():
    """However the devices are listed: the mesh's rows of "data" go slice by slice, and "fsdp" stays in one."""
    devices = [Device(id=i, slice_index=i % 2, process_index=i // 2) for i in range(8)]
    mesh = sharding.make_mesh(-1, 2, devices, slices=2)
    assert dict(mesh.shape) == {"data": 4, "fsdp": 2}
    assert [[device.slice_index for device in row] for row in mesh.devices] == [[0, 0], [0, 0], [1, 1], [1, 1]]
    # Where the devices don't say: whole processes, in their order.
    unknown = [Device(id=7 - i, slice_index=0, process_index=(7 - i) // 4) for i in range(8)]
    mesh = sharding.make_mesh(1, 4, unknown, slices=2)
    assert [[device.id for device in row] for row in mesh.devices] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    for data, fsdp, slices, message in (
        (1, 1, 2, "uses 1 of 4 devices per slice; with several hosts or slices it must use all"),
        (1, 8, 2, "asks for 1 x 8 = 8 devices per slice, but this machine has 4"),
        (1, -1, 3, "config.mesh.slices=3 does not divide the 8 devices"),
    ):
        with pytest.raises(UserError, match=message):
            sharding.make_mesh(data, fsdp, unknown, slices)
    tpus = [dataclasses.replace(device, platform="tpu") for device in devices]
    for slices in (1, 4):
        with pytest.raises(UserError, match=f"config.mesh.slices={slices}, but these devices belong to 2"):
            sharding.make_mesh(-1, 1, tpus, slices)


def test_mesh_takes_what_is_left():
    for data, fsdp in ((-1, 1), (1, -1), (1, 1)):
        mesh = sharding.make_mesh(data, fsdp, jax.devices()[:1])
        assert mesh.axis_names == ("data", "fsdp")
        assert dict(mesh.shape) == {"data": 1, "fsdp": 1}


def test_batches_have_to_divide():
    mesh = jax.sharding.AbstractMesh((2, 4), ("data", "fsdp"))
    sharding.check_batch(mesh, 32, "config.data.batch_size", 4)
    with pytest.raises(UserError, match=r"config.data.batch_size=30 is not divisible by 8 devices; 32 would be"):
        sharding.check_batch(mesh, 30, "config.data.batch_size")
    with pytest.raises(UserError, match="8 devices x 3 accumulation steps; 24 would"):
        sharding.check_batch(mesh, 32, "config.data.batch_size", 3)
