"""The wheel: everything a run needs is inside, and the command works where there is no checkout."""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

import deco_jax
from tests.helpers import ROOT

COPIED = ("deco_jax", "configs", "LICENSE", "README.md", "pyproject.toml", "requirements.txt", "setup.py")


def run(*command: object, cwd: pathlib.Path, **environment: str) -> str:
    result = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **environment},
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder with the package as `pip install .` leaves it; nothing is fetched."""
    folder = tmp_path_factory.mktemp("package")
    checkout = folder / "checkout"
    checkout.mkdir()
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, checkout)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, checkout, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    assert wheel.name == f"deco_jax-{deco_jax.__version__}-py3-none-any.whl"
    run(*pip, "install", "--no-deps", "--no-index", "--target", folder / "installed", wheel, cwd=folder)
    shutil.rmtree(checkout)
    return folder / "installed"


def test_every_file_of_the_package_is_in_the_wheel(installed):
    def names(folder: pathlib.Path) -> set[str]:
        return {
            path.relative_to(folder).as_posix()
            for path in folder.rglob("*")
            if path.is_file() and path.suffix != ".pyc"
        }

    expected = names(ROOT / "deco_jax") | {f"configs/{name}" for name in names(ROOT / "configs")}
    assert names(installed / "deco_jax") == expected


def test_the_command_trains_without_a_checkout(installed, tmp_path):
    """Its config imports another one, its images are package data, and a worker process imports the program again."""
    run(
        installed / "bin" / "deco-jax",
        f"--config={installed}/deco_jax/configs/quickstart.py:smoke",
        "--workdir=run",
        "--config.train.num_steps=1",
        "--config.train.sample_every=0",
        "--config.data.num_workers=1",
        cwd=tmp_path,
        PYTHONPATH=str(installed),
    )
    assert (tmp_path / "run" / "checkpoints" / "1").is_dir()


def test_a_config_of_one_s_own_builds_on_the_project_s(installed, tmp_path):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "base.py").write_text("from configs.quickstart import get_config\n")
    (tmp_path / "configs" / "mine.py").write_text("from configs.base import get_config\n")
    out = subprocess.run(
        [installed / "bin" / "deco-jax", "--config=configs/mine.py:smoke", "--workdir=run", "--config.no.such=1"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(installed)},
    )
    assert out.stderr.startswith("error: there is no setting --config.no.such")
