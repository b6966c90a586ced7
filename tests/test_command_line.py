"""Which config a command line means, its help, and settings under names of earlier versions."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest

from configs import quickstart
from deco_jax import command_line
from deco_jax import config as config_lib
from deco_jax.command_line import find_config, without_earlier
from deco_jax.config import reference, words
from deco_jax.main import MODES
from tests.helpers import ROOT, run_main
from tests.runs import SMOKE, rows, succeed, two_steps


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_lists_every_mode_config_and_setting(flag):
    result = run_main(flag)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    for name, mode in MODES.items():
        assert re.search(rf"^  {name} +{re.escape(mode.about[:30])}", result.stdout, re.MULTILINE), name
    for path in (ROOT / "configs").glob("[a-z]*.py"):
        assert re.search(rf"^  {path.stem} ", result.stdout, re.MULTILINE)
    for flag_name in ("workdir", "mode", "checkpoint", "source", "topology", "port", "distributed"):
        assert f"  --{flag_name} " in result.stdout
    config = quickstart.get_config()
    for key in config_lib.flatten(config.to_dict()):
        assert f"\n  --config.{key}=" in result.stdout, key
    assert "--config.model.decoder_ratio=2" in result.stdout  # of another model
    assert max(map(len, result.stdout.splitlines())) <= 110


def test_the_reference_page_is_up_to_date():
    """Else: python -m deco_jax.config.reference > docs/settings.md"""
    assert (ROOT / "docs" / "settings.md").read_text() == reference.page()


def test_a_run_knows_its_settings(tmp_path):
    """Sampling and going on need only the workdir; another run takes the settings from config.json."""
    run = two_steps(tmp_path)
    own = json.loads((run / "config.json").read_text())
    few = ["--config.sample.num_images=3", "--config.sample.batch_size=3", "--config.sample.npz=True"]
    succeed(f"--workdir={run}", "--mode=sample", *few)
    with np.load(run / "samples" / "samples.npz") as file:
        images = file["arr_0"]
    succeed(SMOKE, f"--workdir={tmp_path / 'other'}", f"--checkpoint={run}", "--mode=sample", *few)
    with np.load(tmp_path / "other" / "samples" / "samples.npz") as file:
        np.testing.assert_array_equal(images, file["arr_0"])
    succeed(f"--workdir={tmp_path / 'third'}", f"--checkpoint={run}", "--mode=sample", *few)
    with np.load(tmp_path / "third" / "samples" / "samples.npz") as file:
        np.testing.assert_array_equal(images, file["arr_0"])

    said = succeed(f"--workdir={run}", "--config.train.num_steps=3").stdout
    assert "resumed at step 2" in said
    assert rows(run)[3]["loss"] > 0

    (run / "extra.json").write_text(json.dumps({**own, "note": "mine", "data": {**own["data"], "colour": "red"}}))
    result = succeed(f"--config={run / 'extra.json'}", f"--workdir={tmp_path / 'new'}", "--config.seed=1")
    assert re.search("extra.json: left out note, data.colour, which this version has no setting for", result.stderr)
    assert json.loads((tmp_path / "new" / "config.json").read_text()) == {**own, "seed": 1}


def test_a_model_named_on_the_command_line_brings_its_settings(tmp_path):
    """Settings that both have stay, its own ones can be given beside it, and the run goes on with them."""
    run = tmp_path / "run"
    jit = ["--config.model.name=jit", "--config.model.bottleneck=8"]
    succeed(SMOKE, f"--workdir={run}", "--config.train.num_steps=2", "--config.train.save_every=2", *jit)
    model = json.loads((run / "config.json").read_text())["model"]
    assert (model["name"], model["bottleneck"], "decoder_width" in model) == ("jit", 8, False)
    assert model["width"] == quickstart.get_config("smoke").model.width
    more = [f"--workdir={run}", "--config.train.num_steps=3"]
    assert "resumed at step 2" in succeed(*more).stdout
    assert "already trained to step 3" in succeed(*more, "--config.model.name=jit").stdout


def test_configs_by_name(tmp_path):
    """Also where there is no folder `configs`, and with --config behind the overrides."""
    command = [sys.executable, "-m", "deco_jax.main", "--mode=compile", "--config.data.batch_size=2"]
    for name in ("quickstart:smoke", "configs/quickstart.py:smoke"):
        result = subprocess.run(
            [*command, f"--config={name}", f"--workdir={tmp_path / 'run'}"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "run" / "compile.json").read_text())["batch_size"] == 2


@pytest.fixture
def renamed(monkeypatch):
    """A version in which train.print_every became train.log_every, and minutes seconds."""
    settings = config_lib.SECTIONS["train"]
    monkeypatch.setitem(settings, "log_every", settings["log_every"]._replace(was="train.print_every"))
    save = settings["save_every"]._replace(was="checkpoint.hours", convert=lambda hours: hours * 60)
    monkeypatch.setitem(settings, "save_every", save)


def test_renamed_settings_keep_their_old_names(renamed, capsys):
    argv = ["main", "--config=x", "--config.train.print_every=7", "--config.checkpoint.hours", "2", "--config.seed=1"]
    expected = ["main", "--config=x", "--config.train.log_every=7", "--config.train.save_every", "120"]
    assert command_line.with_todays_names(argv) == [*expected, "--config.seed=1"]
    assert capsys.readouterr().err == (
        "config.train.print_every is now config.train.log_every; the old name still works\n"
        "config.checkpoint.hours is now config.train.save_every; the old name still works\n"
    )


def test_a_config_file_that_sets_an_old_name_is_told_the_new_one(renamed):
    config = quickstart.get_config("smoke")
    with pytest.raises(AttributeError) as caught:
        config.train.print_every = 3
    message = command_line.unreadable(command_line.Named("my.py", "my.py", False), caught.value)
    assert message.startswith("the config my.py could not be read: ")
    assert message.endswith("; config.train.print_every is now config.train.log_every")


def test_renamed_settings_of_a_saved_config(renamed):
    config = quickstart.get_config("smoke")
    older = config_lib.to_json(config)
    older["train"]["print_every"], older["checkpoint"] = 9, {"hours": 3}
    del older["train"]["log_every"], older["train"]["save_every"]
    config.train.log_every, config.train.save_every = 9, 180
    assert config_lib.complete(older) == config_lib.to_json(config)


def test_the_last_of_a_setting_given_twice_counts():
    """ml_collections joins tuples."""
    given = ["main", "--config.a.b=1,2", "--config.c=3", "--config.a.b=4", "--noconfig.d", "--config.e", "5", "--f=1"]
    assert without_earlier(given) == ["main", *given[2:]]


def test_a_name_means_a_config_and_not_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("cifar10", "run"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    assert find_config(["main", "--config=cifar10"]).path.endswith("configs/cifar10.py")
    assert find_config(["main", "--config=run"]).saved
    assert find_config(["main", "--config=./cifar10"]).saved


def test_only_what_is_near_is_suggested():
    names = list(config_lib.flatten(quickstart.get_config().to_dict()))
    assert words.nearest("sample.colours", names) == []
    assert words.nearest("sample.sead", names) == ["sample.seed"]
    assert words.nearest("model.learning_rate", names) == ["optimizer.learning_rate"]
    assert words.nearest("sampel.guidence", names) == ["sample.guidance"]
    assert words.nearest("train.seed", names) == ["sample.seed", "seed"]
    assert words.nearest("sample.steps", names) == ["sample.num_steps"]
    assert words.nearest("model.deep", names) == ["model.depth"]
    assert words.nearest("a", names) == []
