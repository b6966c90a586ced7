"""Programs whose run, weights or prompts lie in a bucket do what they do on a disk: import, export, LoRA, sampling."""

from __future__ import annotations

import io
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import deco_jax
from configs import quickstart
from deco_jax.data import prompts, sources
from deco_jax.errors import UserError
from deco_jax.programs import convert, sample
from deco_jax.run import storage
from deco_jax.sampling import generate
from tests.bucket_runs import Data, assert_nothing_left_here, killed_and_resumed, same_samples
from tests.buckets import Bucket, download, large_puts, needs_gcs, upload
from tests.helpers import ROOT
from tests.runs import NO_SAMPLES, assert_same_run, files, succeed, two_steps
from tests.test_import_export import FILE, golden_config
from tests.test_lora import command as adapting

pytestmark = needs_gcs


def upload_run(bucket: Bucket, folder, name: str) -> str:
    """A disk's run as if it had been trained in the bucket."""
    where = upload(bucket, folder, name)
    for step in (folder / "checkpoints").iterdir():
        bucket.upload(f"{name}/checkpoints/{step.name}/commit_success.txt", b"Checkpoint commit was successful")
    return where


@pytest.mark.slow
@large_puts
def test_official_weights_go_in_and_out(here, tmp_path):
    here.upload("weights/official.ckpt", FILE.read_bytes())
    config, workdir = golden_config(), "gs://bucket/imported"
    convert.import_checkpoint(config, workdir, "gs://bucket/weights/official.ckpt")
    convert.export_checkpoint(config, workdir)
    before = torch.load(FILE, weights_only=True)
    exported = download(here, "imported/export", tmp_path / "export")
    after = torch.load(exported / "deco.ckpt", weights_only=True)
    assert after["global_step"] == before["global_step"] == 1234
    kept = {name for name in before["state_dict"] if not name.startswith("diffusion_trainer.")}
    assert after["state_dict"].keys() == kept
    for name in kept:
        assert torch.equal(after["state_dict"][name], before["state_dict"][name]), name

    expected = deco_jax.load(exported).sample(classes=[1, 2], num_steps=2, guidance=2.0)
    for path in (f"{workdir}/export", workdir):
        np.testing.assert_array_equal(deco_jax.load(path).sample(classes=[1, 2], num_steps=2, guidance=2.0), expected)
    # What was exported there is imported from there.
    convert.import_checkpoint(config, "gs://bucket/again", f"{workdir}/export/deco.ckpt")
    np.testing.assert_array_equal(
        deco_jax.load("gs://bucket/again").sample(classes=[1, 2], num_steps=2, guidance=2.0), expected
    )
    model = deco_jax.load(f"{workdir}/export/deco.ckpt", config=config)
    np.testing.assert_array_equal(model.sample(classes=[1, 2], num_steps=2, guidance=2.0), expected)
    with pytest.raises(UserError, match="already has checkpoints"):
        convert.import_checkpoint(config, workdir, "gs://bucket/weights/official.ckpt")
    assert_nothing_left_here(tmp_path)


def test_prompts_of_a_bucket(here, tmp_path):
    folder = tmp_path / "prompts"
    folder.mkdir()
    (folder / "list.txt").write_text("a fox\n\na red hen\n")
    (folder / "geneval.jsonl").write_text('{"prompt": "a bench"}\n')
    upload(here, folder, "prompts")
    for name in ("list.txt", "geneval.jsonl"):
        assert prompts.read_prompts(f"gs://bucket/prompts/{name}") == prompts.read_prompts(str(folder / name))
    for name in ("first", "second"):
        here.upload(f"dpg/{name}.txt", f"the {name}".encode())
    assert prompts.read_prompts("gs://bucket/dpg").prompts == ["the first", "the second"]
    here.remove("dpg/first.txt")
    assert prompts.read_prompts("gs://bucket/dpg").names == ["second"]  # not what was fetched before
    with pytest.raises(UserError, match=r"gs://bucket/none\.txt: no such file or folder"):
        prompts.read_prompts("gs://bucket/none.txt")


def test_a_rewritten_checkpoint_of_a_bucket_is_another(here):
    config, where = quickstart.get_config("smoke"), "gs://bucket/rewritten/checkpoints/4"
    found = set()
    for note in (b"the first", b"trained again"):
        here.upload("rewritten/checkpoints/4/_CHECKPOINT_METADATA", note)
        found |= {generate.fingerprint(config, where), generate.fingerprint(config, storage.path(where))}
    assert len(found) == 2


def test_images_of_an_earlier_request_are_kept(here):
    for name in ("request.json", "grid.png", "images/0.png", "images/1.png"):
        here.upload(f"run/samples/{name}", b'{"fingerprint": "first"}' if name == "request.json" else name.encode())
    folder = storage.path("gs://bucket/run/samples")
    sample.keep_earlier(folder, "first")
    assert here.has("run/samples/grid.png")
    sample.keep_earlier(folder, "second")
    assert here.names("run/") == [
        f"run/samples/earlier/1/{name}" for name in ("grid.png", "images/0.png", "images/1.png", "request.json")
    ]
    assert here.files["run/samples/earlier/1/images/1.png"] == b"images/1.png"


def test_finished_images_of_a_bucket_are_fetched_once_for_each_format(here, monkeypatch):
    folder = storage.path("gs://bucket/drawn/samples")
    parts = sample.Parts(folder / "parts", "of this request")
    batches = [np.full((count, 8, 8, 3), 40 * count, np.uint8) for count in (3, 3, 1)]
    for batch in batches:
        parts.add(batch)
    again = sample.Parts(folder / "parts", "of this request")
    assert again.count == parts.count == 7
    fetched, load = [], storage.load_array
    monkeypatch.setattr(storage, "load_array", lambda path: fetched.append(path.name) or load(path))
    names = ["000000000.npy", "000000003.npy", "000000006.npy"]
    for held in (parts, again):
        sample.write_images(folder / "images", held, None)
        sample.write_npz(folder / "samples.npz", held)
        # What was fetched last needn't be fetched again.
        assert [name for i, name in enumerate(fetched) if name != fetched[i - 1]][:3] == names
        assert len(fetched) <= 6
        fetched.clear()
    with np.load(io.BytesIO(here.files["drawn/samples/samples.npz"])) as file:
        np.testing.assert_array_equal(file["arr_0"], np.concatenate(batches))
    image = Image.open(io.BytesIO(here.files["drawn/samples/images/000006.png"]))
    np.testing.assert_array_equal(np.asarray(image), batches[2][0])


@pytest.mark.slow
def test_a_tfds_folder_of_a_bucket(here, tmp_path):
    from tests.test_data_sources import READ

    (tmp_path / "read.py").write_text(READ)
    environment = {**os.environ, "TFDS_DATA_DIR": str(tmp_path / "tfds"), "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, tmp_path / "read.py"], capture_output=True, text=True, timeout=200, env=environment
    )
    assert run.returncode == 0, run.stderr
    folder = run.stdout.strip().split("\n")[-1]
    where = upload(here, tmp_path / "tfds", "tfds") + folder.removeprefix(str(tmp_path / "tfds"))
    settings = {"source": "tfds", "split": ""}
    same_samples(sources.open_source(Data(settings, path=where)), sources.open_source(Data(settings, path=folder)))


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    return two_steps(tmp_path_factory.mktemp("pretrained"))


@pytest.mark.slow
def test_low_rank_factors_beside_a_run_of_a_bucket(here, pretrained, tmp_path):
    """Killed and resumed, on a base in the bucket: the run, its samples and its export are those on a disk."""
    base = upload_run(here, pretrained, "base")
    succeed(*adapting(pretrained), NO_SAMPLES, f"--workdir={tmp_path / 'adapted'}")
    killed_and_resumed(here, "adapted", *adapting(base), NO_SAMPLES, "--workdir=gs://bucket/adapted")
    copy = download(here, "adapted", tmp_path / "copy")
    assert_same_run(copy, tmp_path / "adapted", 4)
    for workdir in ("gs://bucket/adapted", tmp_path / "adapted"):
        succeed(f"--workdir={workdir}", "--mode=sample", "--config.sample.npz=True")
        succeed(f"--workdir={workdir}", "--mode=export")
    theirs = files(tmp_path / "adapted")
    for name in ("samples/samples.npz", "samples/grid.png", "export/ema.safetensors"):
        assert here.files[f"adapted/{name}"] == theirs[name], name
    assert_nothing_left_here(tmp_path)


@pytest.mark.slow
def test_what_a_prediction_goes_by_is_exported(here, tmp_path):
    workdir = "gs://bucket/asymmetric"
    arguments = ("--config=configs/asymmetric256.py:smoke", f"--workdir={workdir}")
    succeed(*arguments, NO_SAMPLES, "--config.train.num_steps=1")
    succeed(*arguments, "--mode=export")
    model, exported = deco_jax.load(workdir), deco_jax.load(f"{workdir}/export")
    np.testing.assert_array_equal(exported.denoiser.prediction.basis, model.denoiser.prediction.basis)
    np.testing.assert_array_equal(exported.sample(classes=[3, 4]), model.sample(classes=[3, 4]))
    assert_nothing_left_here(tmp_path)
