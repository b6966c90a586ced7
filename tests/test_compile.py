from __future__ import annotations

import json
import re
import subprocess
import sys

import jax
import pytest

from configs import imagenet256, quickstart
from deco_jax import flops
from deco_jax.errors import UserError
from deco_jax.programs import compile as compile_lib
from deco_jax.run import hardware, sharding
from tests.helpers import ROOT, run_main

SMOKE = "--config=configs/imagenet256.py:smoke"


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Parameters above the limit of replication, on 8 devices of a fake machine."""
    workdir = tmp_path_factory.mktemp("compile")
    result = run_main(
        SMOKE,
        f"--workdir={workdir}",
        "--mode=compile",
        "--topology=cpu:8",
        "--config.mesh.data=1",
        "--config.mesh.fsdp=8",
        "--config.model.width=256",
        "--config.model.num_classes=1000",
        "--config.model.depth=2",
        "--config.data.batch_size=16",
    )
    assert result.returncode == 0, result.stderr
    assert "memory of this device is not known" in result.stdout
    return json.loads((workdir / "compile.json").read_text())


def test_report_of_a_machine_that_is_not_there(report):
    assert report["devices"] == 8
    assert report["mesh"] == {"data": 1, "fsdp": 8}
    assert report["batch_per_device"] == 2
    assert report["fits"] is None
    config = imagenet256.get_config("smoke")
    config.model.width, config.model.num_classes, config.model.depth = 256, 1000, 2
    assert report["flops_per_step"] == 16 * flops.training(config)
    size = report["bytes"]
    assert size["arguments"] >= size["state"] + size["batch"]
    assert size["peak"] > size["state"] > size["parameters"] > 0
    assert report["seconds_to_compile"] > 0


def test_no_large_parameter_is_whole_on_every_device(report):
    assert report["replicated"] == []


def test_large_replicated_parameters_are_named_without_fsdp():
    config = imagenet256.get_config("smoke")
    config.model.width = 192
    report = compile_lib.compile_report(config, sharding.make_mesh(1, 1))
    # mlp/gate: 3 x 192 x 512 float32 = 1.2 MB.
    assert "denoiser/blocks/mlp/gate/kernel (3, 192, 512)" in report["replicated"]
    assert "config.mesh.fsdp is 1" in compile_lib.describe(report)


SHARE = """
import jax
jax.config.update("jax_num_cpu_devices", 8)
from configs import imagenet256
from deco_jax.programs import compile
from deco_jax.run import sharding
from deco_jax.method.optimizer import make_optimizer
from deco_jax.programs.train import abstract_networks
from deco_jax.run.state import state_shapes
config = imagenet256.get_config()
sizes = []
for data, fsdp in ((1, 8), (8, 1)):
    mesh = sharding.make_mesh(data, fsdp)
    networks, _, _ = abstract_networks(config, mesh)
    sizes.append(compile.bytes_a_device(state_shapes(networks, make_optimizer(config.optimizer), mesh)))
print(sizes[0] / sizes[1])
"""


def test_state_of_xl_at_fsdp_8_is_an_eighth_a_device():
    result = subprocess.run(
        [sys.executable, "-c", SHARE], cwd=ROOT, capture_output=True, text=True, check=True, timeout=300
    )
    assert float(result.stdout) == pytest.approx(1 / 8, rel=0.05)


def test_what_does_not_fit_exits_with_1_and_says_what_to_change(tmp_path, monkeypatch, capsys):
    config = quickstart.get_config("smoke")
    monkeypatch.setattr(compile_lib, "device_memory", lambda device, mesh: 1e5)
    with pytest.raises(SystemExit) as end:
        compile_lib.compile_step(config, str(tmp_path))
    assert end.value.code == 1
    report = json.loads((tmp_path / "compile.json").read_text())
    assert report["fits"] is False
    printed = capsys.readouterr().out
    assert "does NOT fit" in printed
    for remedy in ("config.model.remat=dots", "config.optimizer.accumulate_steps=2", "config.data.batch_size=8"):
        assert remedy in printed


def test_advice_splits_the_state_first(monkeypatch):
    config = imagenet256.get_config()
    report = {"bytes": {"state": 11 * 2**30}, "memory": 15.75 * 2**30}

    class Mesh:
        shape = {"data": 16, "fsdp": 1}  # noqa: RUF012
        size = 16

    assert "config.mesh.fsdp=8" in compile_lib.advice(config, Mesh(), report)[0]


@pytest.mark.parametrize("topology", ["v5e", "v5e:4x", "gpu:8", "cpu:", "4x4"])
def test_a_name_that_is_no_topology(topology):
    with pytest.raises(UserError, match="is not a topology"):
        compile_lib.topology_devices(topology)


def test_compiling_needs_no_data_and_no_teacher(tmp_path):
    config = imagenet256.get_config()
    assert config.data.path == config.teacher.path == ""
    result = run_main(
        SMOKE,
        f"--workdir={tmp_path}",
        "--mode=compile",
        "--topology=cpu:2",
        "--config.loss.repa_weight=0.5",
        "--config.loss.repa_layer=2",
        "--config.teacher.size=S",
        "--config.data.image_size=32",
    )
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "compile.json").read_text())
    assert report["teacher"] is True
    assert report["bytes"]["teacher"] > 4e7  # 22 M parameters in bfloat16


def test_a_mesh_that_the_topology_has_not(tmp_path):
    result = run_main(SMOKE, f"--workdir={tmp_path}", "--mode=compile", "--topology=cpu:2", "--config.mesh.data=4")
    assert result.returncode == 1
    assert re.fullmatch(r"error: .*this machine has 2; .*\n", result.stderr)


@pytest.mark.parametrize(
    "kind, name",
    [
        ("TPU v5 lite", "v5e"),
        ("TPU v5e", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v5p", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("TPU v4", "v4"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA A100-SXM4-40GB", "A100-40GB"),
        ("NVIDIA A100-SXM4-80GB", "A100-80GB"),
        ("cpu", None),
    ],
)
def test_chips_by_jax_names(kind, name):
    class Device:
        device_kind = kind

    chip = hardware.chip_of(Device())
    assert (chip.name if chip else None) == name


@pytest.mark.slow
def test_a_tpu_slice(tmp_path):
    pytest.importorskip("libtpu")
    result = run_main(
        SMOKE,
        f"--workdir={tmp_path}",
        "--mode=compile",
        "--topology=v5e:2x2",
        "--config.mesh.fsdp=4",
        "--config.mesh.data=1",
        "--config.model.dtype=bfloat16",
        timeout=580,
    )
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "compile.json").read_text())
    assert report["chip"] == "v5e"
    assert report["fits"] is True
    assert jax.default_backend() == "cpu"
