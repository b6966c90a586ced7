"""convert/torch_files.py: Lightning checkpoints and safetensors, whole, damaged and wrong."""

from __future__ import annotations

import json
import shutil
import sys
import types

import ml_dtypes
import numpy as np
import pytest

from deco_jax.convert import deco
from deco_jax.convert import torch_files as files
from deco_jax.errors import UserError
from tests.helpers import GOLDEN

CONFIG = types.SimpleNamespace(name="deco", depth=3, decoder_depth=2, patch_size=4, text_depth=0)
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
        with pytest.raises(UserError, match=r"x\.ckpt: no readable PyTorch file") as error:
            files.read_lightning(path)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"none\.ckpt: no such file"):
        files.read_lightning(tmp_path / "none.ckpt")
    with pytest.raises(UserError, match="is a folder"):
        files.read_lightning(tmp_path)
    for other, message in (
        ([1, 2], "holds a list"),
        ({"model": {}}, "no `state_dict`"),
        ({"state_dict": {"denoiser.a": torch.zeros(1), "vae.b": torch.zeros(1)}}, r"no known network: 1 \(vae\.b\)"),
        ({"state_dict": {"diffusion_trainer.proj.0.0.bias": torch.zeros(1)}}, "neither denoiser"),
    ):
        torch.save(other, path)
        with pytest.raises(UserError, match=message):
            files.read_lightning(path)
    torch.save({"step": 1}, path)
    with pytest.raises(UserError, match="no state dictionary"):
        files.read_tensors(path)


def test_code_in_a_file_is_not_run(torch, tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"state_dict": Evil()}, tmp_path / "evil.ckpt")
    with pytest.raises(UserError, match="no readable PyTorch file"):
        files.read_lightning(tmp_path / "evil.ckpt")
    assert not (tmp_path / "ran").exists()


def test_missing_pytorch_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match="pip install torch"):
        files.read_lightning(CHECKPOINT)
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
    with pytest.raises(UserError, match="no readable index"):
        files.read_safetensors(tmp_path)
