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
from deco_jax.programs import search
from deco_jax.run import estimate as estimate_lib
from deco_jax.run import hardware, sharding
from deco_jax.run import program as program_lib
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
    assert "this device doesn't report its memory" in result.stdout
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
from deco_jax.method.training import abstract_networks
from deco_jax.run.state import state_shapes
config = imagenet256.get_config()
sizes = []
for data, fsdp in ((1, 8), (8, 1)):
    mesh = sharding.make_mesh(data, fsdp)
    networks, _, _ = abstract_networks(config, mesh)
    sizes.append(compile.bytes_per_device(state_shapes(networks, make_optimizer(config.optimizer), mesh)))
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
        compile_lib.compile_program(config, str(tmp_path))
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
        ("NVIDIA H800", "H800"),
        ("NVIDIA A800-SXM4-80GB", "A800-80GB"),
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


@pytest.mark.slow
def test_two_tpu_slices(tmp_path):
    """libtpu's own program of each slice: what crosses is what the gradients need, and each chip has all its memory."""
    pytest.importorskip("libtpu")
    result = run_main(
        SMOKE,
        f"--workdir={tmp_path}",
        "--mode=compile",
        "--topology=v5e:2x2",
        "--config.mesh.slices=2",
        "--config.mesh.fsdp=4",
        timeout=580,
    )
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "compile.json").read_text())
    assert report["mesh"] == {"data": 2, "fsdp": 4}
    assert report["memory"] == hardware.CHIPS[0][1].memory
    sent = sum(row["bytes"] for row in report["estimate"]["between_slices"].values())
    # Parameters in float32, of which each chip sends its quarter's gradients, half of them in each direction.
    assert report["bytes"]["parameters"] * 0.9 < sent < report["bytes"]["parameters"] * 1.6


# ------------------------------------------------------------------------------------------------ speed


def test_what_travels_between_devices_is_in_the_report(report):
    estimate = report["estimate"]
    assert estimate["cycles"] is None  # a CPU's compiler doesn't estimate
    assert estimate["seconds"] is None
    kinds = estimate["collectives"]
    # Each device gathers the other seven's eighth of every matrix at least once: its width axis is split by 8.
    split = report["bytes"]["parameters"] * 7
    gathered = sum(row["bytes"] for kind, row in kinds.items() if kind == "all-gather")
    assert gathered > 0.8 * split
    assert set(kinds) <= {"all-gather", "reduce-scatter", "all-reduce"}
    largest = estimate["largest_array"]
    assert largest["bytes"] > 0
    assert largest["source"]


def test_two_slices_that_are_not_there(tmp_path):
    result = run_main(
        "--config=configs/quickstart.py:smoke",
        f"--workdir={tmp_path}",
        "--mode=compile",
        "--topology=cpu:8",
        "--config.mesh.slices=2",
        "--config.mesh.fsdp=4",
    )
    assert result.returncode == 0, result.stderr
    assert "in 2 slices" in result.stdout
    assert "a chip sends to other slices all-reduce" in result.stdout
    report = json.loads((tmp_path / "compile.json").read_text())
    assert report["mesh"] == {"data": 2, "fsdp": 4}
    estimate = report["estimate"]
    assert 0 < estimate["between_slices"]["all-reduce"]["bytes"] < estimate["collectives"]["all-reduce"]["bytes"]


@pytest.mark.parametrize("what", ["sample", "evaluate"])
def test_the_other_programs(what):
    config = imagenet256.get_config("smoke")
    report = compile_lib.compile_report(config, sharding.make_mesh(1, 1), what)
    size = {"sample": config.sample.batch_size, "evaluate": config.evaluate.batch_size}[what]
    assert report["batch_size"] == size
    assert report["estimate"]["collectives"] == {}
    assert report["bytes"]["peak"] > report["bytes"]["parameters"] > 0
    expected = (
        flops.sampling(config) * size if what == "sample" else 2 * 5.7e9 * size
    )  # Szegedy et al. 2015: 5.7e9 MACs
    assert report["flops_per_step"] == pytest.approx(expected, rel=0.05)
    assert "batch" in compile_lib.describe(report)


def hand_made(cycles: int) -> program_lib.Program:
    """Eight chips; an op of so many cycles, and a gather of [1024, 1024] float32."""
    return program_lib.parse(f"""\
HloModule jit_step, num_partitions=8

ENTRY %main (w: f32[128,1024]) -> f32[1024,1024] {{
  %w = f32[128,1024]{{1,0}} parameter(0)
  %copy.1 = f32[128,1024]{{1,0}} copy(%w), metadata={{op_name="jit(step)/mlp/mul"}}, backend_config={{"estimated_cycles":"{cycles}"}}
  ROOT %gather = f32[1024,1024]{{1,0}} all-gather(%copy.1), replica_groups={{}}, dimensions={{0}}
}}
""")  # noqa: E501


@pytest.mark.parametrize("cycles, bound", [(150_000, "compute"), (15, "links")])
def test_bound_by_computation_or_by_links(cycles, bound):
    chip = hardware.Chip("made up", 1.0, peak=1e12, links=1e11, clock=1.5e9)
    values = estimate_lib.estimate(hand_made(cycles), chip, flops=4e8, devices=8)
    assert values["compute_seconds"] == pytest.approx(cycles / 1.5e9)
    links = 7 / 8 * 4 * 1024**2 / 1e11
    assert values["link_seconds"] == pytest.approx(links)
    assert values["bound"] == bound
    assert values["seconds"] == pytest.approx(max(cycles / 1.5e9, links))
    assert values["share_of_peak"] == pytest.approx(4e8 / 8 / 1e12 / values["seconds"])
    assert values["parts"] == {"mlp": 1.0}
    assert values["largest_array"]["type"] == "f32[1024,1024]"
    printed = "\n".join(estimate_lib.words(values, "made up"))
    assert f"limited by {bound}" in printed
    assert "not a measurement" in printed


def test_an_estimate_for_a_chip_without_xlas_model():
    values = estimate_lib.estimate(hand_made(0), hardware.Chip("GPU", 1.0, 1e12, 1e11), flops=8e9, devices=8)
    assert values["cycles"] is None
    assert values["seconds"] is None
    assert values["least_seconds"] == pytest.approx(1e-3)
    assert values["bound"] == "compute"
    assert "at the peak of a GPU" in "\n".join(estimate_lib.words(values, "GPU"))


def test_the_clocks_give_the_sheets_peak():
    """A matrix unit multiplies and adds side² pairs a cycle; as many as the makers say."""
    units = {"v4": 8 * 128**2, "v5e": 4 * 128**2, "v5p": 8 * 128**2, "v6e": 4 * 256**2}
    for _, chip in hardware.CHIPS:
        if chip.name in units:
            assert 2 * units[chip.name] * chip.clock == pytest.approx(chip.peak, rel=0.01)


# ------------------------------------------------------------------------------------------------ the search


def fake_report(config, mesh):
    """As if FSDP over two of eight devices were the fastest, keeping everything didn't fit, nor did large batches."""
    size = config.data.batch_size
    seconds = size * (1.0 if config.mesh.fsdp == 2 else 2.0) * {"none": 0.5, "full": 1.2}.get(config.model.remat, 1.0)
    seconds += config.model.unroll + 5  # what doesn't grow with the batch
    fits = config.model.remat != "none" and size <= 32
    return {
        "fits": fits,
        "bytes": {"peak": 1e9 * size},
        "batch_per_device": size / 8,
        "seconds_to_compile": 1.0,
        "estimate": {"seconds": seconds, "share_of_peak": 0.1, "bound": "compute"} if fits else None,
    }


def test_the_search_finds_the_fastest_that_fits_and_resumes(tmp_path, monkeypatch, capsys):
    calls = []

    def report(config, mesh):
        calls.append(0)
        return fake_report(config, mesh)

    monkeypatch.setattr(search.sharding, "make_mesh", lambda *_: None)
    config = imagenet256.get_config("smoke")
    config.data.batch_size, config.mesh.data, config.mesh.fsdp, config.model.remat = 16, 1, -1, "full"
    search.search_settings(config, tmp_path, [None] * 8, "v5e:2x4", report)
    printed = capsys.readouterr().out
    winner = printed.split("settings of the first: ")[1].splitlines()[0]
    assert winner == (
        "--config.mesh.data=4 --config.mesh.fsdp=2 --config.model.remat=dots --config.model.unroll=1 "
        "--config.data.batch_size=32"
    )
    rows = [json.loads(line) for line in (tmp_path / "search.jsonl").read_text().splitlines()]
    assert len(rows) == len(calls)
    assert len({row["settings"] for row in rows}) == len(rows)
    # Cut off within a line: only that row is compiled again.
    text = (tmp_path / "search.jsonl").read_text()
    (tmp_path / "search.jsonl").write_text(text[: text.rindex('"fits"')])
    calls.clear()
    search.search_settings(config, tmp_path, [None] * 8, "v5e:2x4", report)
    assert len(calls) == 1
    assert winner in capsys.readouterr().out
    # Another model is another search.
    config.model.depth += 1
    calls.clear()
    search.search_settings(config, tmp_path, [None] * 8, "v5e:2x4", report)
    assert len(calls) == len(rows)


def test_a_search_in_which_nothing_fits(tmp_path, monkeypatch, capsys):
    def report(config, mesh):
        return {**fake_report(config, mesh), "fits": False}

    monkeypatch.setattr(search.sharding, "make_mesh", lambda *_: None)
    with pytest.raises(SystemExit):
        search.search_settings(imagenet256.get_config("smoke"), tmp_path, [None] * 8, "v5e:2x4", report)
    assert "nothing that was tried fits" in capsys.readouterr().out
