from __future__ import annotations

import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from launch import sweep
from tests.helpers import ROOT

SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))
ARGUMENTS = ["--config=configs/quickstart.py:smoke", "--workdir=a folder"]


def run(*command, **options) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHON": sys.executable}
    return subprocess.run(
        list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment, **options
    )


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck(script):
    result = run("shellcheck", script)
    assert result.returncode == 0, result.stdout


DRY_RUNS = {
    "single_gpu.sh": (["--gpu=3"], "CUDA_VISIBLE_DEVICES=3"),
    "slurm.sh": (["--nodes=4", "--gpus=8", "--sbatch=--partition=x"], "#SBATCH --nodes=4"),
    "tpu_pod.sh": (["--name=slice", "--zone=here"], "--worker=all"),
    "local_processes.sh": (["3"], "--process_id=2"),
}


@pytest.mark.parametrize("script", [path for path in SCRIPTS if path.name in DRY_RUNS], ids=lambda path: path.name)
def test_dry_run_prints_the_command_and_runs_nothing(script):
    options, expected = DRY_RUNS[script.name]
    result = run(script, "--dry-run", *options, "--", *ARGUMENTS)
    assert result.returncode == 0, result.stderr
    assert expected in result.stdout
    assert "deco_jax.main" in result.stdout
    assert "a\\ folder" in result.stdout.replace("\\\\\\", "\\")  # quoted, however deep
    assert not (ROOT / "a folder").exists()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_without_arguments_it_says_how_to_call_it(script):
    result = run(script)
    assert result.returncode == 2
    assert f"launch/{script.name}" in result.stderr


def test_slurm_script_is_sound():
    script = run("launch/slurm.sh", "--dry-run", "--", *ARGUMENTS).stdout
    assert run("bash", "-n", "/dev/stdin", input=script).returncode == 0
    assert "--ntasks-per-node=8" in script
    assert "#SBATCH --cpus-per-task=8" in script
    assert "export SRUN_CPUS_PER_TASK=8" in script
    assert "--signal=B:TERM@120" in script


def test_values_split_at_commas_outside_brackets():
    assert sweep.split_values("1e-4,2e-4") == ["1e-4", "2e-4"]
    assert sweep.split_values("(0.,1.),(.1,1.)") == ["(0.,1.)", "(.1,1.)"]


def test_grid_times_list():
    runs = sweep.plan(pathlib.Path("w"), ["a.x=1,2"], ["b.y=3 c=4  # a comment", "", "b.y=5"])
    assert [r.settings for r in runs] == [
        {"b.y": "3", "c": "4", "a.x": "1"},
        {"b.y": "3", "c": "4", "a.x": "2"},
        {"b.y": "5", "a.x": "1"},
        {"b.y": "5", "a.x": "2"},
    ]
    assert len({r.folder for r in runs}) == 4


def test_names_can_be_listed_with_commas():
    runs = sweep.plan(pathlib.Path("w"), ["seed=0,1", "sample.guidance_interval=(0.,1.),(.1,1.)"], [])
    assert [run.folder.name for run in runs][:2] == [
        "seed=0_guidance_interval=_0._1._",
        "seed=0_guidance_interval=_.1_1._",
    ]


def test_runs_whose_names_would_be_equal_get_two_folders():
    runs = sweep.plan(pathlib.Path("w"), ["path=a/b,a_b"], [])
    assert len({r.folder for r in runs}) == 2


def finished(folder: pathlib.Path, loss: float, step: int = 10, **more: float) -> None:
    (folder / "checkpoints" / "10").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"train": {"num_steps": 10}, "data": {"batch_size": 8}}))
    (folder / "metrics.jsonl").write_text(json.dumps({"step": step, "loss": loss, **more}) + '\n{"step": 1')


def test_what_is_done(tmp_path):
    (run,) = sweep.plan(tmp_path, [], [])
    assert not sweep.is_done(run)
    finished(run.folder, 1.0)
    assert sweep.is_done(run)
    assert sweep.is_done(run, more=["--config.train.num_steps=9"])
    assert not sweep.is_done(run, more=["--config.train.num_steps=11"])
    assert not sweep.is_done(run, "evaluate")
    (run.folder / "evaluation.json").write_text("{}")
    assert sweep.is_done(run, "evaluate")
    later = (run.folder / "evaluation.json").stat().st_mtime + 1
    os.utime(run.folder / "metrics.jsonl", (later, later))  # trained further
    assert not sweep.is_done(run, "evaluate")


def test_measured_again_with_other_overrides(tmp_path):
    """Both forms of an override count; a note of the sweep's own says with which it measured."""
    (run,) = sweep.plan(tmp_path, ["seed=1"], [])
    finished(run.folder, 1.0)
    assert not sweep.is_done(run, more=["--config.train.num_steps", "11"])
    (run.folder / "evaluation.json").write_text("{}")
    more = ["--config.sample.num_images=10"]
    sweep.measured_with(run, "evaluate").write_text(json.dumps({"sample.num_images": "10", "seed": "1"}))
    assert sweep.is_done(run, "evaluate", more)
    assert sweep.is_done(run, "evaluate", ["--config.sample.num_images", "10"])
    assert not sweep.is_done(run, "evaluate", ["--config.sample.num_images=20"])


def test_a_run_of_other_settings_is_not_taken_for_ones_own(tmp_path):
    """seed and sample.seed name the same folder."""
    command = [sys.executable, "launch/sweep.py", *ARGUMENTS[:1], f"--workdir={tmp_path}"]
    finished(tmp_path / "seed=1", 1.0)
    stored = {"train": {"num_steps": 10}, "data": {"batch_size": 8}, "seed": 1, "sample": {"seed": 0}}
    (tmp_path / "seed=1" / "config.json").write_text(json.dumps(stored))
    assert run(*command, "--grid=seed=1").returncode == 0
    refused = run(*command, "--grid=sample.seed=1")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "seed=1 holds a run with sample.seed=0, not 1; give another --workdir" in refused.stderr
    stored["optimizer"] = {"learning_rate": 1e-4}
    (tmp_path / "seed=1" / "config.json").write_text(json.dumps(stored))
    # What was trained can't have got it since; what is drawn or printed can.
    words = ("--config.sample.num_steps=3", "--config.train.log_every=2", "--config.optimizer.learning_rate=1e-4")
    assert "already done" in run(*command, "--grid=seed=1", "--", *words).stdout
    refused = run(*command, "--grid=seed=1", "--", "--config.optimizer.learning_rate=2e-4")
    assert "holds a run with optimizer.learning_rate=0.0001, not 2e-4; give another --workdir" in refused.stderr
    refused = run(*command, "--grid=seed=1", "--only=1")
    assert (refused.returncode, "the runs are 0 to 0" in refused.stderr) == (1, True)


@pytest.mark.parametrize(
    "text, value",
    [
        ("1e-4", 0.0001),
        ("1", 1.0),
        (".1", 0.1),
        ("(.1,1.)", [0.1, 1.0]),
        ("true", True),
        ("False", False),
        ("test", "test"),
        ("2", "2"),
        ("32", [32, 32]),  # of data.image_size
        ("", ""),
    ],
)
def test_what_an_override_means(text, value):
    assert sweep.equal(text, value)
    assert not sweep.equal("0.5", value)


def test_table_is_sorted_and_unfinished_runs_come_last(tmp_path):
    runs = sweep.plan(tmp_path, ["seed=0,1,2"], [])
    finished(runs[0].folder, 2.0)
    finished(runs[1].folder, 1.0, step=5)
    evaluation = runs[0].folder / "evaluation.json"
    for step, column in ((9, ""), (10, " fid |")):  # one from before the last step was trained doesn't count
        evaluation.write_text(json.dumps({"fid": 3.5, "samples": {"from": f"drawn from /x/checkpoints/{step}"}}))
        table = sweep.gather(runs, tmp_path, "loss", descending=False).splitlines()
        assert table[0] == f"| seed | done | loss | step |{column}"
    evaluation.write_text(json.dumps({"fid": 3.5, "files": {}}))
    table = sweep.gather(runs, tmp_path, "loss", descending=False).splitlines()
    assert table[0] == "| seed | done | loss | step | fid |"
    assert [line.split(" | ")[0] for line in table[2:]] == ["| 1", "| 0", "| 2"]
    rows = json.loads((tmp_path / "sweep.json").read_text())
    assert [row["done"] for row in rows] == [False, True, False]
    descending = sweep.gather(runs, tmp_path, "loss", descending=True).splitlines()
    assert [line.split(" | ")[0] for line in descending[2:]] == ["| 0", "| 1", "| 2"]


def test_one_training_is_measured_with_each_value(tmp_path):
    command = [
        sys.executable,
        "launch/sweep.py",
        "--config=configs/cifar10.py",
        "--variants=deco,dit",
        "--sort=fid",
        "--modes=train,evaluate",
        "--measure=sample.guidance=1.0,1.5",
        "--plot=fid",
        f"--workdir={tmp_path}",
    ]
    lines = run(*command, "--dry-run").stdout.splitlines()
    assert ["--mode=train" in line for line in lines] == [True, False, False] * 2
    deco = tmp_path / "variant=deco"
    assert f"--workdir={deco / 'guidance=1.5'} --mode=evaluate --checkpoint={deco}" in lines[2]
    assert "--config.sample.guidance=1.5" in lines[2]
    assert "guidance" not in lines[0]

    for i, name in enumerate(("deco", "dit")):
        folder = tmp_path / f"variant={name}"
        finished(folder, 1.0, images_per_second=2.0, fid=90.0 + i)
        for j, guidance in enumerate(("1.0", "1.5")):
            (folder / f"guidance={guidance}").mkdir()
            values = {"fid": 10.0 * i - j, "parameters": 7, "missing": {}}
            (folder / f"guidance={guidance}" / "evaluation.json").write_text(json.dumps(values))
    result = run(*command)
    assert result.stdout.count("already done") == 6, result.stderr
    rows = json.loads((tmp_path / "sweep.json").read_text())
    assert [row["fid"] for row in rows] == [-1.0, 0.0, 9.0, 10.0]
    assert [row["sample.guidance"] for row in rows] == ["1.5", "1.0"] * 2
    assert [row["paper's fid"] for row in rows] == [67.55] * 2 + [61.1] * 2  # both without a teacher
    assert {row["run"] for row in rows} >= {"variant=dit/guidance=1.0"}
    assert rows[0]["hours"] == pytest.approx(10 * 8 / 2.0 / 3600)
    assert rows[0]["parameters"] == 7
    assert rows[0]["quick_fid"] == 90.0
    (deco / "guidance=1.0" / "evaluation.json").unlink()
    run(*command, "--gather")
    assert "fid" not in json.loads((tmp_path / "sweep.json").read_text())[-1]  # what was logged is no evaluation
    assert (tmp_path / "fid.png").read_bytes().startswith(b"\x89PNG")
    (deco / "metrics.jsonl").write_text('{"step": 20, "loss": 1}')  # trained further: measured anew
    lines = run(*command, "--dry-run").stdout.splitlines()
    assert sum("deco" in line and "evaluate" in line and "main" in line for line in lines) == 2


def test_sweep_runs_skips_and_gathers(tmp_path):
    arguments = [
        "launch/sweep.py",
        "--config=configs/quickstart.py:smoke",
        f"--workdir={tmp_path}",
        "--grid",
        "seed=0,1",
        "--",
        "--config.train.num_steps=1",
        "--config.train.sample_every=0",
    ]
    dry = run(sys.executable, arguments[0], "--dry-run", *arguments[1:])
    assert dry.stdout.count("deco_jax.main") == 2
    assert not list(tmp_path.iterdir())
    first = run(sys.executable, *arguments)
    assert first.returncode == 0, first.stderr
    assert "running seed=0" in first.stdout
    assert (tmp_path / "sweep.md").read_text().count("True") == 2
    again = run(sys.executable, *arguments)
    assert again.stdout.count("already done") == 2


def test_variants_modes_and_the_papers_figures(tmp_path):
    command = [
        sys.executable,
        "launch/sweep.py",
        "--config=configs/ablation.py",
        "--variants=deco,dit",
        "--grid",
        "seed=0",
        "--modes=train,evaluate",
        f"--workdir={tmp_path}",
    ]
    lines = run(*command, "--dry-run", "--", "--config.data.path=/data").stdout.splitlines()
    assert [("ablation.py:deco" in line, "--mode=train" in line) for line in lines] == [
        (True, True),
        (True, False),
        (False, True),
        (False, False),
    ]
    assert all("--config.seed=0" in line and "--config.data.path=/data" in line for line in lines)
    for name, fid in (("deco", 40.0), ("dit", 30.0)):
        finished(tmp_path / f"variant={name}_seed=0", 1.0)
        (tmp_path / f"variant={name}_seed=0" / "evaluation.json").write_text(json.dumps({"fid": fid}))
    again = run(*command, "--sort=fid")
    assert again.stdout.count("already done") == 4, again.stderr
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in again.stdout.splitlines()[4:]]
    assert table[0][:5] == ["variant", "seed", "done", "fid", "paper's fid"]
    assert [row[0] for row in table[2:]] == ["dit", "deco"]  # Table 1: 61.10 and 31.35
    assert [row[3:5] for row in table[2:]] == [["30", "61.1"], ["40", "31.35"]]


def test_sweep_refuses_what_it_cannot_do(tmp_path):
    for bad, message in (("--modes=trian", "no mode 'trian'"), ("--variants=a", "already names a variant")):
        result = run(sys.executable, "launch/sweep.py", *ARGUMENTS[:1], f"--workdir={tmp_path}", bad)
        assert (result.returncode, message in result.stderr) == (1, True)


def test_sweep_says_which_run_failed(tmp_path):
    result = run(
        sys.executable,
        "launch/sweep.py",
        "--config=configs/quickstart.py:smoke",
        f"--workdir={tmp_path}",
        "--grid",
        "model.num_heads=5",
    )
    assert result.returncode == 1
    assert "1 of 1 runs failed: num_heads=5" in result.stderr


def test_a_training_that_ended_early_is_not_measured(tmp_path):
    """Whatever its status, it lacks the last step."""
    log, stub = tmp_path / "log", tmp_path / "python"
    stub.write_text(f'#!/bin/sh\necho "$@" >> {log}\n')
    stub.chmod(0o755)
    command = [sys.executable, "launch/sweep.py", "--config=configs/quickstart.py:smoke", "--grid=seed=0"]
    options = ["--modes=train,evaluate", f"--workdir={tmp_path / 'sweep'}"]
    environment = {**os.environ, "PYTHON": str(stub)}
    result = subprocess.run([*command, *options], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert (result.returncode, "1 of 1 runs failed: seed=0" in result.stderr) == (1, True)
    assert log.read_text().count("--mode=train") == 1
    assert "--mode=evaluate" not in log.read_text()


def test_sweep_as_an_array(tmp_path):
    result = run(
        sys.executable,
        "launch/sweep.py",
        "--config=configs/quickstart.py:smoke",
        f"--workdir={tmp_path}",
        "--grid",
        "seed=0,1,2",
        "--slurm",
        "--sbatch=--gpus=1",
        "--dry-run",
        "--",
        "--config.train.num_steps=1",
    )
    assert "#SBATCH --array=0-2" in result.stdout
    assert "#SBATCH --gpus=1" in result.stdout
    assert '--only="$SLURM_ARRAY_TASK_ID" -- --config.train.num_steps=1' in result.stdout
    assert run("bash", "-n", "/dev/stdin", input=result.stdout).returncode == 0
