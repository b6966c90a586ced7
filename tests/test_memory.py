"""What a run needs at the very least: against the arrays of a real state, and refused in a line."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from configs import imagenet256, quickstart
from deco_jax.errors import UserError
from deco_jax.method.optimizer import make_optimizer
from deco_jax.models import network
from deco_jax.run import memory, sharding
from deco_jax.run.state import create_state


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_training_needs_the_state_and_its_gradient(name):
    config = quickstart.get_config("smoke")
    config.optimizer.name = name
    networks = {"denoiser": network.build(config.model.to_dict())}
    mesh = sharding.make_mesh(-1, 1)
    state = create_state(0, networks, make_optimizer(config.optimizer), mesh)
    arrays = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    gradients = sum(leaf.nbytes for leaf in jax.tree.leaves(state["params"]))
    need = memory.training_bytes(config, 1, 1)
    assert need["weights and optimizer"] == pytest.approx(arrays + gradients, abs=100)  # the counters
    images = np.zeros((16, 16, 16, 3), np.uint8)
    floats, hidden = np.zeros((3, *images.shape), np.float32), np.zeros((2, 16, 4 * 4, 32), np.float32)
    assert need["a batch"] == images.nbytes + floats.nbytes + hidden.nbytes
    assert memory.training_bytes(config, 4, 2)["weights and optimizer"] == need["weights and optimizer"] / 2
    assert memory.training_bytes(config, 4, 2)["a batch"] == need["a batch"] / 4


def test_what_fits_nowhere_is_refused(monkeypatch):
    config = imagenet256.get_config()
    assert memory.num_params(config) == 682_282_851
    monkeypatch.setattr(memory, "host_memory", lambda: 200 * 2**30)
    memory.check_memory(config, training=True)
    monkeypatch.setattr(memory, "host_memory", lambda: 12 * 2**30)
    memory.check_memory(config, training=False)
    with pytest.raises(UserError, match=r"at least 17\.3 GiB .*optimizer 12\.7, a batch 4\.5\), .* has 12\.0; make"):
        memory.check_memory(config, training=True)
    config.sample.batch_size, config.data.image_size = 60_000, (512, 512)
    with pytest.raises(UserError, match=r"weights 2\.5, a batch 351\.6\), .*config\.sample\.batch_size"):
        memory.check_memory(config, training=False)
    config.model.width, config.model.depth = 65_536, 1024
    with pytest.raises(UserError, match=r"at least [\d,]{7,}\.\d GiB"):
        memory.check_memory(config, training=True)


def test_this_hosts_memory():
    assert 2**28 < memory.host_memory() < 2**50
