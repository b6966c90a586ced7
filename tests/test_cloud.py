"""What only a real cloud shows: its own service, network and credentials. Behind one environment variable.

DECO_JAX_CLOUD=gs://BUCKET/FOLDER python -m pytest -n 0 tests/test_cloud.py
DECO_JAX_CLOUD=s3://BUCKET/FOLDER WANDB_API_KEY=... python -m pytest -n 0 tests/test_cloud.py
"""

from __future__ import annotations

import json
import os

import pytest

from deco_jax.run import checksums, storage, tracking
from tests.bucket_runs import FOUR_STEPS, RUN, Data, assert_nothing_left_here, killed_and_resumed, same_samples
from tests.buckets import RealBucket, download, make_images, needs_cloud, upload, uses
from tests.runs import assert_same_run

pytestmark = needs_cloud


@pytest.fixture
def cloud(monkeypatch, tmp_path):
    with uses({}, monkeypatch, tmp_path):
        bucket = RealBucket()
        yield bucket
        bucket.clear()


def test_a_run_killed_and_resumed_is_the_one_on_a_disk(cloud, whole_run, tmp_path):
    images, expected = whole_run
    where = upload(cloud, images, "images")
    command = (*RUN, *FOUR_STEPS, f"--config.data.path={where}", f"--workdir={cloud.url}/run")
    killed_and_resumed(cloud, "run", *command)
    assert_same_run(download(cloud, "run", tmp_path / "copy"), expected, 4)
    checksums.check(storage.path(f"{cloud.url}/run/checkpoints/4"))
    noted = json.loads(cloud.files["run/checkpoints/4/checksums.json"])["service"]
    assert all(sums for _, sums in noted.values())
    assert_nothing_left_here(tmp_path)


def test_captioned_pairs_are_those_on_a_disk(cloud, tmp_path):
    from deco_jax.data import sources

    folder = make_images(tmp_path / "images", captions=True)
    settings = {"source": "captioned_folder", "split": "", "image_size": 16, "num_workers": 0}
    ours = sources.open_source(Data(settings, path=upload(cloud, folder, "images")))
    same_samples(ours, sources.open_source(Data(settings, path=str(folder))))


@pytest.mark.skipif(
    not os.environ.get("WANDB_API_KEY"), reason="needs Weights & Biases: DECO_JAX_CLOUD and WANDB_API_KEY"
)
def test_a_run_that_goes_on_is_one_run_at_weights_and_biases(tmp_path):
    wandb = pytest.importorskip("wandb", reason="needs wandb")
    for step in (1, 2):
        with tracking.Tracker("deco_jax_test", tmp_path / "run", {"seed": 1}) as tracker:
            tracker.log(step, {"loss": 0.5 / step})
            place = tracker._run.path
    run = wandb.Api().run(place)
    assert [(row["step"], row["loss"]) for row in run.scan_history(["step", "loss"])] == [(1, 0.5), (2, 0.25)]
    run.delete()
