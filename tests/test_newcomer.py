"""README's eight lines, from a fresh `pip install .` to four images of one class, on a run of the tiny quickstart."""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from tests.helpers import ROOT
from tests.test_package import COPIED

LINES = 8


def readme_lines() -> list[str]:
    lines = [line.strip() for line in (ROOT / "README.md").read_text().splitlines()]
    first = lines.index("!pip install .")
    found = lines[first : first + LINES]
    assert all(found)
    assert not lines[first + LINES]
    return found


def shell(command: str, cwd: pathlib.Path, binaries: pathlib.Path) -> str:
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        command, shell=True, cwd=cwd, capture_output=True, text=True, timeout=1500,
        env={**kept, "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.fast
def test_eight_lines():
    install, train, *python = readme_lines()
    assert (install, train) == ("!pip install .", "!deco-jax --config=quickstart --workdir=runs/quickstart")
    compile("\n".join(python), "README.md", "exec")


@pytest.mark.slow
def test_from_pip_install_to_four_images(tmp_path):
    """In a virtual environment of its own, which fetches the packages; notebooks run lines with ! in a shell."""
    install, train, *python = readme_lines()
    checkout, elsewhere = tmp_path / "checkout", tmp_path / "elsewhere"
    checkout.mkdir()
    elsewhere.mkdir()
    for name in COPIED:
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, checkout / name)
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    binaries = tmp_path / "venv" / "bin"
    shell(install.removeprefix("!"), checkout, binaries)
    shell(train.removeprefix("!").replace("quickstart", "quickstart:smoke", 1), elsewhere, binaries)
    *lines, shown = python
    program = [*lines, f"shown = {shown}", "print(deco_jax.__file__, images.shape, images.dtype, shown.size)"]
    (elsewhere / "cell.py").write_text("\n".join(program) + "\n")
    printed = shell("python cell.py", elsewhere, binaries).split()
    assert printed[0].startswith(str(tmp_path / "venv"))  # the installed package, not a checkout
    assert " ".join(printed[1:]) == "(4, 16, 16, 3) uint8 (512, 128)"
