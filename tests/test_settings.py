"""A run's settings over time: what changes is said and kept, what would change its meaning is refused."""

from __future__ import annotations

import json

import pytest

from configs import quickstart
from deco_jax import config as config_lib
from deco_jax.errors import UserError
from deco_jax.run import settings
from tests.runs import NO_SAMPLES, SMOKE, files, steps, succeed, two_steps
from tests.test_bad_input import refuse


def history(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / settings.HISTORY).read_text().splitlines()]


def test_changes_are_recorded_once(tmp_path):
    config = quickstart.get_config("smoke")
    settings.record(tmp_path, config, 0)
    written = (tmp_path / "config.json").read_bytes()
    assert json.loads(written) == config_lib.to_json(config)
    assert settings.changes(tmp_path, config) == {}
    settings.record(tmp_path, config, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]

    config.optimizer.learning_rate = 0.25
    assert settings.changes(tmp_path, config) == {"optimizer.learning_rate": (0.001, 0.25)}
    assert settings.said(settings.changes(tmp_path, config)).endswith("so far: optimizer.learning_rate 0.001 → 0.25")
    settings.record(tmp_path, config, 3)
    config.train.num_steps = 9
    settings.record(tmp_path, config, 4)
    assert [(line["step"], line["changed"]) for line in history(tmp_path)] == [
        (3, {"optimizer.learning_rate": [0.001, 0.25]}),
        (4, {"train.num_steps": [4, 9]}),
    ]
    assert json.loads((tmp_path / "config.json").read_text()) == config_lib.to_json(config)


def test_settings_that_an_older_version_lacks_are_no_change(tmp_path):
    config = quickstart.get_config("smoke")
    older = config_lib.to_json(config)
    older["data"]["image_size"] = 16
    del older["sample"]["grid_images"], older["benchmark"]
    (tmp_path / "config.json").write_text(json.dumps(older))
    config.sample.grid_images, config.benchmark.warmup, config.benchmark.repeats = 64, 3, 20
    assert settings.changes(tmp_path, config) == {}


@pytest.mark.parametrize("text", ["", "[1]", "{}", '{"model": {"name": "nope"}}'])
def test_a_damaged_config_is_written_anew(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    config = quickstart.get_config("smoke")
    assert settings.changes(tmp_path, config) == {}
    settings.record(tmp_path, config, 0)
    assert json.loads((tmp_path / "config.json").read_text()) == config_lib.to_json(config)


def test_a_size_that_only_the_config_asks_for_is_refused(tmp_path):
    config = quickstart.get_config("smoke")
    settings.check_drawn(config, [], str(tmp_path), "")
    settings.record(tmp_path, config, 0)
    settings.check_drawn(config, [], str(tmp_path), "")
    config.data.image_size = (8, 24)
    settings.check_drawn(config, ["data.image_size"], str(tmp_path), "")
    for workdir, checkpoint in ((tmp_path, ""), (tmp_path / "other", tmp_path)):
        says = r"was trained with config.data.image_size=\(16, 16\), but the config says \(8, 24\); leave --config out"
        with pytest.raises(UserError, match=says):
            settings.check_drawn(config, ["sample.seed"], str(workdir), str(checkpoint))
    config.data.image_size, config.path.noise_scale = (16, 16), 3.0
    with pytest.raises(UserError, match=r"config.path.noise_scale=1.0, but the config says 3.0"):
        settings.check_drawn(config, [], str(tmp_path), "")
    settings.check_drawn(config, ["path.noise_scale"], str(tmp_path), "")


def test_another_optimizer_is_refused_before_its_state_is_read(tmp_path):
    config = quickstart.get_config("smoke")
    settings.record(tmp_path, config, 0)
    settings.check_kept(tmp_path, config)
    config.optimizer.name = "muon"
    with pytest.raises(UserError, match=r"config.optimizer.name was adamw and is muon; leave --config out"):
        settings.check_kept(tmp_path, config)


def test_what_a_run_trains_with_is_what_its_config_says(tmp_path):
    run = two_steps(tmp_path)
    before = files(run)
    said = succeed(SMOKE, f"--workdir={run}", "--config.train.num_steps=2", "--config.optimizer.learning_rate=0.5")
    assert "already trained to step 2" in said.stdout
    assert "optimizer.learning_rate 0.001 → 0.5" in said.stdout
    after = files(run)
    assert after["config.json"] == before["config.json"]
    assert settings.HISTORY not in after

    said = succeed(f"--workdir={run}", NO_SAMPLES, "--config.train.num_steps=3", "--config.optimizer.learning_rate=0.5")
    assert "so far: optimizer.learning_rate 0.001 → 0.5, train.num_steps 2 → 3" in said.stdout
    assert [(line["step"], line["changed"]) for line in history(run)] == [
        (2, {"optimizer.learning_rate": [0.001, 0.5], "train.num_steps": [2, 3]})
    ]
    said = succeed(f"--workdir={run}", "--config.train.num_steps=4")
    assert "so far: train.num_steps 3 → 4\n" in said.stdout  # the learning rate is the run's own now
    assert json.loads((run / "config.json").read_text())["optimizer"]["learning_rate"] == 0.5
    assert steps(run)[-1] == "4"

    before = files(run)
    says = r"config.data.image_size was \[16, 16\] and is \[24, 24\]; leave --config out to continue"
    refuse(SMOKE, f"--workdir={run}", "--config.data.image_size=24", "--config.train.num_steps=9", says=says)
    says = r"was trained with config.data.image_size=\(16, 16\), but the config says \(32, 32\); leave --config out"
    refuse("--config=imagenet256:smoke", f"--workdir={run}", "--mode=sample", says=says)
    assert files(run) == before
