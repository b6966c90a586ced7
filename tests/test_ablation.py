"""Every row of the ablation trains through the command line, with REPA where the paper has it."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

from configs import ablation
from deco_jax.convert import torch_files
from deco_jax.convert.mapping import to_torch
from deco_jax.models import dinov2, network
from tests.helpers import run_main


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    """A ViT-S/14 of real shape with random weights, as Meta's file would hold it."""
    net = network.functional(lambda rngs: dinov2.DINOv2.of_size("S", rngs=rngs))
    params = jax.tree.map(np.asarray, jax.jit(net.init)(jax.random.key(0)))
    path = tmp_path_factory.mktemp("teacher") / "dinov2_vits14.safetensors"
    torch_files.write_safetensors(path, to_torch(dinov2.table(12), params))
    return path


# Rows that differ from another one in a number alone.
NUMBERS = ("width16", "width64", "depth1", "depth6", "weight0.5", "weight2", "quality50", "quality100")


@pytest.mark.parametrize(
    "row", [pytest.param(row, marks=pytest.mark.slow if row in NUMBERS else ()) for row in ablation.ROWS]
)
def test_row_trains(row, teacher, tmp_path):
    with_repa = ablation.get_config(row).loss.repa_weight > 0
    options = []
    if with_repa:
        options = [
            "--config.loss.repa_weight=0.5",
            "--config.loss.repa_layer=2",
            "--config.teacher.size=S",
            f"--config.teacher.path={teacher}",
        ]
    result = run_main(
        f"--config=configs/ablation.py:{row}-smoke",
        f"--workdir={tmp_path}",
        *options,
        "--config.train.num_steps=2",
        "--config.train.sample_every=0",
    )
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in rows] == [1, 2]
    assert all(np.isfinite(entry["loss"]) for entry in rows)
    assert all(("alignment" in entry) == with_repa for entry in rows)
    assert ("frequency" in rows[0]) == (ablation.get_config(row).loss.frequency_weight > 0)


def test_a_missing_teacher_is_one_line_and_nothing_is_written(tmp_path):
    result = run_main(
        "--config=configs/ablation.py:smoke",
        f"--workdir={tmp_path / 'run'}",
        "--config.loss.repa_weight=0.5",
        "--config.loss.repa_layer=2",
        "--config.teacher.path=/nowhere/dinov2.pth",
    )
    assert (result.returncode, len(result.stderr.strip().splitlines())) == (1, 1)
    assert "dinov2_vitb14_pretrain.pth" in result.stderr
    assert not (tmp_path / "run").exists()
