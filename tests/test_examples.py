"""The examples run as they stand, at smoke length."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.helpers import ROOT
from tests.runs import rows


def test_a_loss_of_one_s_own(tmp_path):
    command = [sys.executable, "examples/own_loss.py", "--smoke", "--workdir", str(tmp_path / "run")]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr
    metrics = rows(tmp_path / "run")
    assert list(metrics) == [1, 2, 3, 4]
    for row in metrics.values():
        assert row["edges"] > 0
        assert row["loss"] == pytest.approx(row["pixel"] + row["frequency"] + 0.1 * row["edges"], rel=1e-4)


def test_the_notebook(monkeypatch):
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(ROOT / "examples" / "first_run.ipynb", as_version=4)
    monkeypatch.setenv("DECO_JAX_SMOKE", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    nbclient.NotebookClient(notebook, timeout=600).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3
