from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from PIL import Image

from deco_jax.data import sources
from deco_jax.errors import UserError
from deco_jax.run import distributed
from tests.helpers import ROOT, fake_devices, run_main
from tests.runs import SMOKE, files, rows, steps, succeed

MESH = ("--config.mesh.data=2", "--config.mesh.fsdp=4")


@pytest.mark.parametrize(
    "environment, expected",
    [
        ({}, False),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8"}, False),  # inside an allocation, but not started by srun
        ({"SLURM_STEP_NUM_TASKS": "8"}, True),
        ({"SLURM_STEP_NUM_TASKS": "1"}, False),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
    ],
)
def test_who_started_this_process(environment, expected):
    assert distributed.several_tasks(environment) is expected


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"coordinator": "a:1"}, "give all three"),
        ({"coordinator": "a:1", "num_processes": 2, "process_id": 2}, "give all three"),
        ({"num_processes": 2, "process_id": 0}, "give all three"),
        ({"coordinator": "a", "num_processes": 2, "process_id": 0}, "needs a port"),
        ({"timeout": 0}, "at least 1 second"),
    ],
)
def test_flags_that_contradict_each_other(flags, message):
    with pytest.raises(UserError, match=message):
        distributed.start(**flags)


def test_one_process_agrees_with_itself():
    done = []
    distributed.on_main_host(lambda: done.append(1))
    distributed.on_every_host(lambda: done.append(2))
    assert done == [1, 2]
    assert distributed.from_main_host(3) == 3
    assert distributed.all_hosts(True)
    assert not distributed.all_hosts(False)
    assert distributed.same_on_all_hosts("text")


def test_hosts_that_list_other_images(monkeypatch):
    """Each reads its share of one order: with a file less on one of them an epoch would repeat and leave out images."""

    class Fewer(sources.Digits):
        def __len__(self):
            return super().__len__() - 1

    first_host = []
    monkeypatch.setattr(distributed, "from_main_host", lambda value: first_host.append(value) or first_host[0])
    distributed.check_same_data(sources.Digits())
    distributed.check_same_data(sources.Digits())
    with pytest.raises(UserError, match=r"the hosts don't list the same images .here 1,796 in 10 classes"):
        distributed.check_same_data(Fewer())


@pytest.mark.parametrize(
    "ours, theirs, raised",
    [
        (None, 0, None),
        (None, 1, OSError("another host failed here")),
        (None, 2, UserError("another host failed here")),
        (ValueError("damaged"), 0, ValueError("damaged")),
        (ValueError("damaged"), 1, ValueError("damaged")),
        (ValueError("damaged"), 2, UserError("another host failed here")),
        (UserError("another model"), 1, UserError("another model")),
    ],
)
def test_what_fails_on_one_host_fails_on_all(ours, theirs, raised, monkeypatch):
    def action():
        if ours:
            raise ours

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(
        distributed.multihost_utils, "process_allgather", lambda value: np.asarray([value, theirs], np.int32)
    )
    if raised is None:
        distributed.on_every_host(action)
        return
    with pytest.raises(type(raised), match=str(raised)) as caught:
        distributed.on_every_host(action)
    assert caught.type is type(raised)


def test_stage_logs_where_there_are_several(capsys):
    with distributed.stage("testing", who="process 1 of 2"):
        pass
    logged = capsys.readouterr().err
    assert "process 1 of 2" in logged
    assert "testing ..." in logged
    with distributed.stage("testing"):
        pass
    assert capsys.readouterr().err == ""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.parametrize("process", [0, 1])
def test_a_process_that_waits_in_vain_names_the_stage(process, tmp_path):
    result = run_main(
        SMOKE,
        f"--workdir={tmp_path / 'run'}",
        f"--coordinator=127.0.0.1:{free_port()}",
        "--num_processes=2",
        f"--process_id={process}",
        "--distributed_timeout=4",
        timeout=120,
    )
    assert result.returncode == 1
    last = [line for line in result.stderr.splitlines() if line.startswith("error:")][-1]
    assert "still connecting to the coordinator 127.0.0.1:" in last
    assert f"process {process} of 2" in last
    assert not (tmp_path / "run").exists()


def together(workdir, *arguments: str, config: str = SMOKE, change: str = "") -> list[subprocess.Popen]:
    """Two processes with four devices each, running the program after `change` has replaced parts of it."""
    port = free_port()
    script = f"import sys\nfrom deco_jax import main\n{change}\nsys.argv[0] = 'main'\nmain.cli()\n"
    program = ["-c", script] if change else ["-m", "deco_jax.main"]
    environment = {**os.environ, **fake_devices(4)}
    return [
        subprocess.Popen(
            [
                sys.executable,
                *program,
                config,
                f"--workdir={workdir}",
                *MESH,
                *arguments,
                f"--coordinator=127.0.0.1:{port}",
                "--num_processes=2",
                f"--process_id={i}",
            ],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(2)
    ]


def finish(processes: list[subprocess.Popen], timeout: float = 400, code: int = 0) -> list[str]:
    try:
        outputs = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [code, code], "\n".join(outputs)
    return outputs


@pytest.mark.slow
def test_two_hosts_train_and_sample_like_one_and_one_goes_on(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    eight = fake_devices(8)
    succeed(SMOKE, f"--workdir={one}", *MESH, env=eight, timeout=400)

    outputs = finish(together(two, "--config.train.num_steps=2"))
    assert "done: step 2" in outputs[0]
    assert "done: step 2" not in outputs[1]  # one host speaks
    for stage in ("connecting", "creating the state", "compiling the training step", "the first step"):
        assert all(stage in output for output in outputs)
    # One process with the same eight devices takes over.
    succeed(SMOKE, f"--workdir={two}", *MESH, env=eight, timeout=400)

    expected, actual = rows(one), rows(two)
    assert list(expected) == list(actual) == [1, 2, 3, 4]
    for step in expected:
        for name in ("loss", "pixel", "frequency", "gradient_norm"):
            assert actual[step][name] == pytest.approx(expected[step][name], rel=1e-5)
    for name in ("step_00000002.png", "step_00000004.png"):
        grids = [np.asarray(Image.open(folder / "samples" / name), np.int32) for folder in (one, two)]
        assert np.abs(grids[0] - grids[1]).max() <= 1

    outputs = finish(together(two, "--mode=sample", "--config.sample.npz=True"))
    assert "samples.npz" in outputs[0]
    succeed(SMOKE, f"--workdir={one}", *MESH, "--mode=sample", "--config.sample.npz=True", env=eight, timeout=400)
    images = [np.load(folder / "samples" / "samples.npz")["arr_0"].astype(np.int32) for folder in (one, two)]
    assert np.abs(images[0] - images[1]).max() <= 1


@pytest.mark.slow
def test_two_hosts_pass_over_a_checkpoint_that_is_damaged(tmp_path):
    """Each host checks a share of the files, so only one of them sees the damage."""
    run = ("--config.train.save_every=1", "--config.train.sample_every=0")
    finish(together(tmp_path, "--config.train.num_steps=2", *run))
    largest = max((tmp_path / "checkpoints" / "2" / "params" / "d").iterdir(), key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    outputs = finish(together(tmp_path, "--config.train.num_steps=3", *run))
    assert "resumed at step 1" in outputs[0]
    said = [re.search(r"2 is damaged and passed over: (.*)", output)[1] for output in outputs]
    (reason,) = [line for line in said if "isn't what was written" in line]
    assert reason.startswith("its file params/d/")
    assert "another host failed here, and its log says why" in said
    assert sorted(steps(tmp_path)) == ["1", "2", "2.damaged", "3"]


READ_FAILS = """
from deco_jax.run.checkpoint import read
whole = read._read
def failing(path, shapes):
    if "/2/params" in str(path) and "--process_id=1" in sys.argv:
        raise OSError("stale file handle")
    return whole(path, shapes)
read._read = failing
"""


@pytest.mark.slow
def test_two_hosts_pass_over_a_checkpoint_that_one_fails_to_read(tmp_path):
    """The checks found nothing wrong with it."""
    run = ("--config.train.save_every=1", "--config.train.sample_every=0")
    finish(together(tmp_path, "--config.train.num_steps=2", *run))
    outputs = finish(together(tmp_path, "--config.train.num_steps=3", *run, change=READ_FAILS))
    assert "2 is damaged and passed over: stale file handle" in outputs[1]
    assert "resumed at step 1" in outputs[0]
    assert sorted(steps(tmp_path)) == ["1", "2", "2.damaged", "3"]


DIES = """
import os
from deco_jax.run import distributed
same = distributed.check_same_data
def dies(source):
    if "--process_id=1" in sys.argv:
        os._exit(9)
    return same(source)
distributed.check_same_data = dies
"""


@pytest.mark.slow
def test_a_host_that_is_lost_before_training_is_worth_a_restart(tmp_path):
    processes = together(tmp_path, change=DIES)
    outputs = [process.communicate(timeout=200)[0] for process in processes]
    assert [process.returncode for process in processes] == [distributed.RESTART, 9], outputs[0]
    assert "ending with status 75: start all processes again" in outputs[0]
    assert "Traceback" not in outputs[0]


@pytest.mark.slow
def test_two_hosts_encode_captions_like_one(tmp_path):
    config, batch = "--config=configs/t2i_256.py:smoke", "--config.data.batch_size=64"
    folders = [tmp_path / "one", tmp_path / "two"]
    succeed(config, "--mode=encode", "--workdir=unused", batch, f"--config.text.features={folders[0]}")
    outputs = finish(together("unused", "--mode=encode", batch, f"--config.text.features={folders[1]}", config=config))
    assert "1,797 of 1,797 captions" in outputs[0]
    assert "captions" not in outputs[1]  # one host speaks
    one, two = files(folders[0]), files(folders[1])
    assert one == two
    assert sorted(one) == ["captions_00000.npy", "features_00000.npy", "null.npy", "store.json"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "signalled, number, save_every", [(0, signal.SIGTERM, 100000), (1, signal.SIGTERM, 1), (1, signal.SIGINT, 100000)]
)
def test_a_signal_to_any_host_saves_the_same_step_on_all(signalled, number, save_every, tmp_path):
    processes = together(
        tmp_path,
        "--config.train.num_steps=100000",
        f"--config.train.save_every={save_every}",
        "--config.train.sample_every=0",
        "--config.train.keep_checkpoints=1",
    )
    metrics = tmp_path / "metrics.jsonl"
    deadline = time.monotonic() + 400
    while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
        assert time.monotonic() < deadline, finish(processes, timeout=1)
        time.sleep(0.1)
    processes[signalled].send_signal(number)
    outputs = finish(processes, code=distributed.RESTART)
    (saved,) = steps(tmp_path)
    assert f"saved step {saved}" in outputs[0]
    assert rows(tmp_path)[int(saved) - 1]["step"] == int(saved) - 1


@pytest.mark.slow
def test_two_hosts_stop_in_the_middle_of_a_grid(tmp_path):
    """The grid of step 2 has 2,000 batches; both leave it before the same one, and have saved the step."""
    processes = together(
        tmp_path,
        *("--config.train.num_steps=100000", "--config.train.save_every=100000", "--config.train.sample_every=2"),
        *("--config.sample.num_images=16000", "--config.sample.grid_images=10000", "--config.sample.batch_size=8"),
        "--config.sample.num_steps=50",
    )
    metrics = tmp_path / "metrics.jsonl"
    deadline = time.monotonic() + 400
    while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
        assert time.monotonic() < deadline, finish(processes, timeout=1)
        time.sleep(0.1)
    time.sleep(10)
    processes[1].send_signal(signal.SIGTERM)
    outputs = finish(processes, timeout=120, code=distributed.RESTART)
    assert steps(tmp_path) == ["2"]
    assert "saved step 2" in outputs[0]
    assert not (tmp_path / "samples" / "step_00000002.png").exists()
