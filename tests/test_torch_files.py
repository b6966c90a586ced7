"""convert/torch_files.py: Lightning checkpoints and safetensors, whole, damaged and wrong."""

from __future__ import annotations

import argparse
import collections
import json
import os
import pathlib
import shutil
import sys
import zipfile

import ml_dtypes
import numpy as np
import pytest

from deco_jax.convert import deco
from deco_jax.convert import torch_files as files
from deco_jax.errors import UserError
from tests.helpers import GOLDEN

pytestmark = pytest.mark.fast

CONFIG = dict(name="deco", depth=3, decoder_depth=2, patch_size=4, text_depth=0)
CHECKPOINT = GOLDEN / "lightning.ckpt"


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


def test_reading_the_official_layout(torch):
    checkpoint = files.read_lightning(CHECKPOINT)
    assert (checkpoint.step, checkpoint.epoch) == (1234, 3)
    assert checkpoint.denoiser.keys() == checkpoint.ema.keys()
    assert set(checkpoint.projector) == {f"0.{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")}
    name = "blocks.1.attn.qkv.weight"
    assert not np.array_equal(checkpoint.denoiser[name], checkpoint.ema[name])


def test_there_and_back_is_exact(torch, tmp_path):
    """Read, converted, converted back, written: every tensor of the file to the bit, and the same frame."""
    source = files.read_lightning(CHECKPOINT)
    written = files.Checkpoint(
        denoiser=deco.to_torch(CONFIG, deco.from_torch(CONFIG, source.denoiser)),
        ema=deco.to_torch(CONFIG, deco.from_torch(CONFIG, source.ema)),
        projector=deco.projector_to_torch(deco.projector_from_torch(source.projector)),
        step=source.step,
        epoch=source.epoch,
    )
    files.write_lightning(tmp_path / "new" / "copy.ckpt", written)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["copy.ckpt"]
    before = torch.load(CHECKPOINT, weights_only=True)
    del before["loops"]  # empty there; Lightning, which looks for every loop in it, would stop at an empty one
    after = torch.load(tmp_path / "new" / "copy.ckpt", weights_only=True)
    assert before.keys() == after.keys()
    assert before["state_dict"].keys() == after["state_dict"].keys()
    for key, tensor in before["state_dict"].items():
        other = after["state_dict"][key]
        assert other.dtype == tensor.dtype
        assert other.is_contiguous()
        assert torch.equal(other.view(torch.int32), tensor.view(torch.int32)), key
    del before["state_dict"], after["state_dict"]
    assert before == after


def test_bfloat16_and_old_files(torch, tmp_path):
    values = torch.arange(6, dtype=torch.bfloat16).reshape(2, 3) / 3
    torch.save({"a": values}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    read = files.read_tensors(tmp_path / "old.pth")
    assert read["a"].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(read["a"].astype(np.float32), values.float().numpy())
    files.write_lightning(tmp_path / "new.ckpt", files.Checkpoint(denoiser=read))
    assert torch.equal(torch.load(tmp_path / "new.ckpt", weights_only=True)["state_dict"]["denoiser.a"], values)


def test_damaged_and_wrong_files(torch, tmp_path):
    content = CHECKPOINT.read_bytes()
    path = tmp_path / "x.ckpt"
    for damaged in (b"", b"not a checkpoint " * 100, content[:-4000], content[: len(content) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"x\.ckpt: not a readable PyTorch weight file") as error:
            files.read_lightning(path)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"none\.ckpt: no such file"):
        files.read_lightning(tmp_path / "none.ckpt")
    with pytest.raises(UserError, match="is a folder"):
        files.read_lightning(tmp_path)
    for other, message in (
        ([1, 2], "holds a list"),
        ({"model": {}}, "no `state_dict`"),
        ({"state_dict": {"denoiser.a": torch.zeros(1), "vae.b": torch.zeros(1)}}, r"an unknown network: 1 \(vae\.b\)"),
        ({"state_dict": {"diffusion_trainer.proj.0.0.bias": torch.zeros(1)}}, "neither denoiser"),
    ):
        torch.save(other, path)
        with pytest.raises(UserError, match=message):
            files.read_lightning(path)
    torch.save({"step": 1}, path)
    with pytest.raises(UserError, match="not a state dictionary"):
        files.read_tensors(path)


def test_code_in_a_file_is_not_run(torch, tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"state_dict": Evil()}, tmp_path / "evil.ckpt")
    with pytest.raises(UserError, match="no `state_dict` of tensors"):
        files.read_lightning(tmp_path / "evil.ckpt")
    torch.save({"state_dict": Evil()}, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match="not a readable PyTorch weight file") as error:
        files.read_lightning(tmp_path / "old.ckpt")
    assert str(error.value).isprintable()  # PyTorch's reason switches a terminal to bold
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("changed", ["data.pkl", "data/7"])
def test_a_flipped_byte_is_found(torch, tmp_path, changed):
    """Also where the file is still a pickle of tensors: by the archive's checksums."""
    path = tmp_path / "x.ckpt"
    content = bytearray(CHECKPOINT.read_bytes())
    with zipfile.ZipFile(CHECKPOINT) as archive:
        name = next(name for name in archive.namelist() if name.endswith(f"/{changed}"))
        whole = archive.read(name)
    at = content.index(whole) + (whole.index(b"blocks") if changed == "data.pkl" else 3)
    content[at] ^= 0x41
    path.write_bytes(content)

    def read_all():
        checkpoint = files.read_lightning(path)
        for tensors in (checkpoint.denoiser, checkpoint.ema, checkpoint.projector):
            dict(tensors)

    with pytest.raises(UserError, match=rf"{changed} fails its checksum.*download"):
        read_all()


def test_files_without_checksums_are_read(torch, tmp_path):
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.arange(5.0)}, tmp_path / "x.pth")
    finally:
        torch.serialization.set_crc32_options(before)
    np.testing.assert_array_equal(files.read_tensors(tmp_path / "x.pth")["a"], np.arange(5))


def lightning(torch, path, tensors=None, **content):
    state = {"denoiser.a": torch.ones(2)} if tensors is None else tensors
    torch.save({"state_dict": state, "global_step": 7, "epoch": 1, **content}, path)
    return path


def test_what_lightning_keeps_beside_the_weights(torch, tmp_path):
    """Hyper-parameters of classes that need not be installed here, and counts of NumPy's, are no damage."""
    odd = {
        "hyper_parameters": argparse.Namespace(path=pathlib.PosixPath("/data"), rate=np.float64(1e-4)),
        "callbacks": {"a": np.arange(3), "b": {1, 2}, "c": collections.defaultdict(list, x=[1])},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(2)}}}],
    }
    read = files.read_lightning(lightning(torch, tmp_path / "x.ckpt", **odd, global_step=np.int64(5), epoch=None))
    assert (read.step, read.epoch, read.has_optimizer) == (5, 0, True)
    np.testing.assert_array_equal(read.denoiser["a"], np.ones(2))
    assert not files.read_lightning(CHECKPOINT).has_optimizer
    assert files.read_lightning(lightning(torch, tmp_path / "x.ckpt", global_step=torch.tensor(9))).step == 9
    assert files.read_lightning(lightning(torch, tmp_path / "x.ckpt", global_step=None)).step == 0


@pytest.mark.parametrize("step", [-1, 2**31, "many", 1.5, float("nan"), [1]])
def test_steps_that_are_none(torch, tmp_path, step):
    with pytest.raises(UserError, match=r"global_step=.* is not a count from 0 to"):
        files.read_lightning(lightning(torch, tmp_path / "x.ckpt", global_step=step))


def odd_tensors(torch):
    nan = torch.ones(3)
    nan[1] = float("nan")
    return {
        "complex numbers": torch.ones(2, dtype=torch.complex64),
        "conjugated": torch.ones(2, dtype=torch.complex64).conj(),
        "sparse": torch.eye(2).to_sparse(),
        "meta tensor": torch.ones(2, device="meta"),
        "not finite": nan,
        "are not finite": torch.full((2,), float("inf"), dtype=torch.bfloat16),
    }


@pytest.mark.parametrize("said", odd_tensors(__import__("torch")))
def test_tensors_that_are_no_weights_are_named(torch, tmp_path, said):
    path = lightning(torch, tmp_path / "x.ckpt", {"denoiser.a": odd_tensors(torch)[said]})
    with pytest.raises(UserError, match=rf"x\.ckpt: a .*{said}"):
        files.read_lightning(path).denoiser["a"]
    with pytest.raises(UserError, match=r"names aren't text: 1 \(3\)"):
        files.read_lightning(lightning(torch, path, {3: torch.ones(1)}))


def test_every_kind_of_dense_tensor(torch, tmp_path):
    """float8, views of a shared storage, transposed and empty ones, parameters: PyTorch's own values."""
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {
        "float8": torch.arange(6).to(torch.float8_e4m3fn),
        "view": base[1:3, ::2],
        "transposed": base.T,
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(base.double()),
        "half": base.half(),
        "integers": torch.arange(3),
    }
    torch.save(tensors, tmp_path / "x.pth")
    read = files.read_tensors(tmp_path / "x.pth")
    for name, tensor in tensors.items():
        expected = tensor.detach().float().numpy() if name == "float8" else tensor.detach().numpy()
        assert read[name].shape == tensor.shape
        np.testing.assert_array_equal(read[name].astype(expected.dtype), expected, err_msg=name)


def test_pytorch_is_named_where_it_is_needed(torch, monkeypatch, tmp_path):
    """For writing, and for files from before its archives; the others are read without it."""
    torch.save({"a": torch.ones(1)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    monkeypatch.setitem(sys.modules, "torch", None)
    assert files.read_lightning(CHECKPOINT).step == 1234
    with pytest.raises(UserError, match="pip install torch"):
        files.read_tensors(tmp_path / "old.pth")
    with pytest.raises(UserError, match="pip install torch"):
        files.write_lightning(tmp_path / "x.ckpt", files.Checkpoint())


def test_safetensors(tmp_path):
    tensors = {"a": np.arange(6.0, dtype=np.float32).reshape(2, 3).T, "b": np.ones(2, ml_dtypes.bfloat16)}
    path = tmp_path / "model.safetensors"
    files.write_safetensors(path, tensors, {"step": "7"})
    for source in (path, tmp_path):
        read = files.read_safetensors(source)
        assert read.keys() == tensors.keys()
        for name, a in tensors.items():
            assert read[name].dtype == a.dtype
            np.testing.assert_array_equal(read[name], a)
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(UserError, match="not a readable safetensors file"):
        files.read_safetensors(path)
    with pytest.raises(UserError, match="no such file"):
        files.read_safetensors(tmp_path / "none.safetensors")


def test_an_index_and_its_files_have_to_agree(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    files.write_safetensors(tmp_path / "1.safetensors", {"a": np.ones(1, np.float32)})
    files.write_safetensors(tmp_path / "2.safetensors", {"b": np.ones(1, np.float32)})

    def listing(**names: str) -> None:
        index.write_text(json.dumps({"weight_map": names}))

    listing(a="1.safetensors", b="2.safetensors")
    assert set(files.read_safetensors(tmp_path)) == {"a", "b"}
    listing(a="1.safetensors", b="2.safetensors", c="2.safetensors")
    with pytest.raises(UserError, match=r"lack: 1 \(c\)"):
        files.read_safetensors(tmp_path)
    shutil.copy(tmp_path / "2.safetensors", tmp_path / "3.safetensors")
    listing(a="1.safetensors")
    files.write_safetensors(tmp_path / "1.safetensors", {"a": np.ones(1, np.float32), "z": np.ones(1, np.float32)})
    with pytest.raises(UserError, match=r"doesn't list: 1 \(z\)"):
        files.read_safetensors(tmp_path)
    listing(a="4.safetensors")
    with pytest.raises(UserError, match=r"4\.safetensors: no such file"):
        files.read_safetensors(tmp_path)
    index.write_text("{}")
    with pytest.raises(UserError, match="not a readable index"):
        files.read_safetensors(tmp_path)


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_safetensors_have_the_rights_that_the_umask_leaves(tmp_path, umask):
    before = os.umask(umask)
    try:
        files.write_safetensors(tmp_path / "a.safetensors", {"a": np.zeros(3, np.float32)})
    finally:
        os.umask(before)
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask
