"""The compiler flags that the program sets for itself."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from deco_jax.run import hardware
from tests.helpers import ROOT

pytestmark = pytest.mark.fast

FLAG = "--xla_cpu_experimental_ynn_fusion_type"


@pytest.mark.parametrize(
    "jaxlib, before, after",
    [
        ("0.10.2", "", f"{FLAG}=reduce"),
        ("0.12.0.1", "--xla_dump_to=here", f"--xla_dump_to=here {FLAG}=reduce"),
        ("0.10.2", f"{FLAG}=dot", f"{FLAG}=dot"),  # as the user says
        ("0.9.2", "", ""),  # XLA would end the process
        ("0.13.0", "", ""),
    ],
)
def test_only_where_it_is_known_and_not_set(monkeypatch, jaxlib, before, after):
    monkeypatch.setenv("XLA_FLAGS", before)
    monkeypatch.setattr(hardware, "version", lambda package: {"jaxlib": jaxlib}[package])
    hardware.set_xla_flags()
    assert os.environ["XLA_FLAGS"] == after


@pytest.mark.parametrize("devices, platforms, found", [(["/dev/nvidia0"], "", True), (["/dev/nvidia0"], "cpu", False)])
def test_a_gpus_flags_are_set_where_there_is_one(monkeypatch, devices, platforms, found):
    monkeypatch.setattr(hardware.glob, "glob", lambda pattern: devices)
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_enable_latency_hiding_scheduler=false")
    monkeypatch.setattr(hardware, "version", lambda package: "0.11.2")
    hardware.set_xla_flags()
    flags = os.environ["XLA_FLAGS"].split()
    assert flags[0] == "--xla_gpu_enable_latency_hiding_scheduler=false"  # as the user says
    assert sum("latency_hiding" in flag for flag in flags) == 1
    assert any("combine_threshold" in flag for flag in flags) == found


def test_this_jaxlib_knows_the_gpus_flags():
    """XLA reads all of them as it starts, whatever the device, and ends the process at one that it doesn't know."""
    flags = " ".join(f"{name}={value}" for name, value in hardware._GPU_FLAGS.items())
    code = "import jax; jax.numpy.ones(1).block_until_ready()"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, timeout=120)


def test_compiled_programs_are_kept_in_the_users_folder(tmp_path):
    """Unless JAX has been told another folder, or none."""
    program = "import jax; from deco_jax.run.hardware import keep_compiled_programs as keep; keep(); "
    program += "print(jax.config.jax_compilation_cache_dir); jax.jit(lambda x: x + 1)(1)"
    plain = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    for extra, expected in (({}, str(tmp_path / "deco_jax")), ({"JAX_COMPILATION_CACHE_DIR": "/other"}, "/other")):
        env = {**plain, "XDG_CACHE_HOME": str(tmp_path), **extra, "JAX_ENABLE_COMPILATION_CACHE": str(not extra)}
        done = subprocess.run([sys.executable, "-c", program], env=env, cwd=ROOT, capture_output=True, text=True)
        assert done.stdout.startswith(expected), done.stderr
    assert any(path.is_file() for path in (tmp_path / "deco_jax").rglob("*"))
