"""The exported `deco.ckpt` in the real Lightning, which is what the official trainer loads it with."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

from deco_jax.convert import torch_files
from tests.helpers import GOLDEN

# As the official module names its networks; the tensors' shapes are taken from the file.
TRAINER = """
import sys, warnings
warnings.simplefilter("ignore")
import torch
import lightning

path = sys.argv[1]
state = torch.load(path, weights_only=True)["state_dict"]

class Official(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        for name, tensor in state.items():
            *parents, last = name.split(".")
            module = self
            for parent in parents:
                if parent not in module._modules:
                    module.add_module(parent, torch.nn.Module())
                module = module._modules[parent]
            module.register_parameter(last, torch.nn.Parameter(torch.zeros_like(tensor)))

    def matches(self):
        return all(torch.equal(value, state[name]) for name, value in self.state_dict().items())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)

    def training_step(self, batch, index):
        assert self.matches()
        return sum(p.sum() for p in self.parameters()) * 0.0

    def validation_step(self, batch, index):
        assert self.matches()

    def predict_step(self, batch, index):
        assert self.matches()
        return batch

def data():
    return torch.utils.data.DataLoader(torch.zeros(2, 1))

def trainer(**options):
    return lightning.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, **options
    )

trainer().predict(Official(), data(), ckpt_path=path)
trainer().validate(Official(), data(), ckpt_path=path, verbose=False)
trainer(max_steps=1, limit_val_batches=0).fit(Official(), data(), ckpt_path=path)
print("lightning", lightning.__version__, "loaded it")
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("lightning") is None, reason="needs pip install lightning==2.4.0")
def test_lightning_loads_an_exported_file(tmp_path):
    """In predict, validate and fit, with the weights of the file."""
    torch_files.write_lightning(tmp_path / "deco.ckpt", torch_files.read_lightning(GOLDEN / "lightning.ckpt"))
    command = [sys.executable, "-c", TRAINER, str(tmp_path / "deco.ckpt")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "loaded it" in result.stdout
