"""What bad input gets, through the command line: one line, exit status 1, nothing half-written."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tests.helpers import GOLDEN, ROOT, run_main
from tests.runs import NO_SAMPLES, SMOKE, files, rows, steps, succeed, two_steps

# What is given on the command line, and what the line has to say. {tmp} is an empty folder, {data} one with faulty
# data and a file, {run} a finished run of two steps.
FLAGS = [
    ([], "--config is missing"),
    (["--config"], "no config"),
    (["--config="], "no config"),
    (["--config=configs/none.py"], "no config 'configs/none.py'"),
    (["--config=configs"], "no config 'configs'"),
    (["--config=configs/quickstart.py:nope"], r"there is no variant 'nope'; choose digits or smoke"),
    (["--config=configs/cifar10.py:nope"], "there is no variant 'nope'"),
    (["--config=configs/imagenet256.py:nope"], "there is no variant 'nope'"),
    ([SMOKE, "--config.model.widht=64"], r"--config.model.widht; did you mean --config.model.width"),
    ([SMOKE, "--config.modle.width=64"], r"--config.modle.width; did you mean --config.model.width"),
    ([SMOKE, "--noconfig.data.flop"], r"--config.data.flop; did you mean --config.data.flip"),
    ([SMOKE, "--config.train.num_steps.x=1"], r"no setting --config.train.num_steps.x"),
    ([SMOKE, "--config.model=3"], r"--config.model=3"),
    ([SMOKE, "--modus=train"], "modus"),
    ([SMOKE, "--mode=fly"], "--mode=fly.*train"),
    ([SMOKE, "--mode=demo", "--port=70000"], "--port=70000.*upper_bound|--port=70000.*65535"),
    ([SMOKE, "somewhere"], "unexpected argument 'somewhere'"),
    ([SMOKE, "--mode=report", "--checkpoint={run}"], "--mode=report doesn't read --checkpoint, only train, sample"),
    ([SMOKE, "--mode=sample", "--port=8080"], "--mode=sample doesn't read --port, only demo"),
    ([SMOKE, "--source=a.ckpt"], "--mode=train doesn't read --source, only import"),
    ([SMOKE, "--mode=sample", "--topology=v5e:4x4"], "doesn't read --topology, only compile"),
    ([SMOKE, "--checkpoint={tmp}/none"], "there is no checkpoint in .*/none"),
    ([SMOKE, "--checkpoint=hdfs://a/run"], "--checkpoint=hdfs://a/run is neither a path nor in a bucket"),
    ([SMOKE, "--config.path.name=energy", "--config.sample.sampler=sde"], "only the straight path's velocity gives"),
    (
        [
            SMOKE,
            "--config.sample.guidance=2.0",
            "--config.sample.guidance_rule=zero_star",
            "--config.sample.num_steps=1",
        ],
        "guidance_zero_steps=1 leaves none of config.sample.num_steps=1",
    ),
    ([SMOKE, "--config.loss.balance_start=1"], "balances the perceptual losses"),
    ([SMOKE, "--config.init_from=hdfs://a/run"], "config.init_from=hdfs://a/run is neither a path nor in a bucket"),
    ([SMOKE, "--config.init_from=~/no such run"], "there is no checkpoint in /.*/no such run"),
    ([SMOKE, "--config.data.batch_size=abc"], "--config.data.batch_size=abc.*a value like 16"),
    ([SMOKE, "--config.data.batch_size=2.5"], "--config.data.batch_size=2.5.*a value like 16"),
    ([SMOKE, "--config.data.flip=3"], "--config.data.flip=3.*a value like False"),
    (["--config=quikstart"], "no config 'quikstart'; did you mean quickstart"),
    (["--config=nothing"], "no config 'nothing'; there are ablation, .*quickstart"),
    (["--config={tmp}/config.json"], "no config .*: there is no such file"),
    (["--config={data}/list.json"], "list.json is not a run's saved config"),
    (["--config={data}/broken.json"], "broken.json is not a saved config: it isn't JSON"),
    (["--config={data}/newer.json"], "newer.json has settings of the model deco that this .* know: model.colour"),
    (["--config=quickstart:smoke", "--config.sample.colours=3"], "sample.colours; --help lists all settings"),
    ([SMOKE, "--config.model.batch_size=3"], "did you mean --config.data.batch_size or --config.evaluate.b.*"),
    ([SMOKE, "--config.sample.steps=3"], "did you mean --config.sample.num_steps"),
    ([SMOKE, "--config.model.decoder_ratio=3"], "decoder_ratio; it belongs to model.name=pixnerd, but this .* deco"),
    ([SMOKE, "--config.model.name=jit", "--config.model.decoder_width=8"], "decoder_width; it .* this config's is jit"),
    ([SMOKE, "--config.model.name=unet"], "model.name='unet' is not"),
    (["--workdir={run}", "--config.model.depth=3"], "another model .*depth: 2 there, 3 here"),
    (["--workdir={run}", "--config.model.deep=3"], "no setting --config.model.deep; did you mean .*depth"),
    ([SMOKE, "--config.data.num_workers=1000"], "num_workers=1000 must be at least 0 and at most 256"),
    ([SMOKE, "--config.data.batch_size=4294967296"], "batch_size=4294967296 must be .*at most 1,048,576"),
    ([SMOKE, "--config.data.image_size=1000000"], "image_size=1000000 must be .*at most 8,192"),
    ([SMOKE, "--config.sample.num_images=2147483647"], "num_images=2147483647 must be .*at most 10,000,000"),
    ([SMOKE, "--config.model.width=2147483648"], "width=2147483648 must be .*at most 65,536"),
]
EVALUATE = ["--mode=evaluate", "--config.evaluate.inception={data}/file"]
VALUES = [
    (["--config.data.batch_size=0"], "batch_size=0 must be at least 1"),
    (["--config.model.patch_size=3"], "patch_size=3 does not divide the image, 16x16"),
    (["--config.model.num_heads=3"], "num_heads=3 does not divide .*width=32"),
    (["--config.model.width=24"], "head width 6 .*multiple of 4"),
    (["--config.data.image_size=4"], "image_size=4 must be a side of at least 8"),
    (["--config.data.image_size=(16,4)"], r"image_size=\(16, 4\) must be a side of at least 8"),
]
MACHINE = [
    (["--config.mesh.data=1024"], "1024 x 1 = 1024 devices, but this machine has"),
    (["--config.mesh.fsdp=1024"], "1024"),
    (
        ["--config.model.attention=cudnn", "--config.model.dtype=bfloat16"],
        "cudnn for heads of 8 channels needs an NVIDIA GPU of .*, not cpu; use auto",
    ),
    (["--config.data.source=image_folder"], "data.path is empty"),
    (["--config.data.source=image_folder", "--config.data.path={tmp}/none"], "no such folder: .*/none"),
    (["--config.data.source=image_folder", "--config.data.path={tmp}"], "no class folders"),
    (["--config.data.source=tfds", "--config.data.path={tmp}/none"], "no such folder: .*/none"),
    (["--config.model.num_classes=11"], "the data has 10 classes, but the model has 11"),
    (["--config.data.source=image_folder", "--config.data.path={data}/no_images"], "class folders without images"),
    (
        ["--config.data.source=image_folder", "--config.data.path={data}/one_class"],
        "the data has 1 classes.*num_classes=1",
    ),
    (["--config.data.source=webdataset"], "data.path is empty; .* for the source webdataset"),
    (["--config.data.source=captioned_folder", "--config.data.path={tmp}/none"], "no such folder: .*/none"),
    (["--config.data.source=captioned_folder", "--config.data.path={data}/one_class"], "1 images without a caption"),
    (["--config.data.source=webdataset", "--config.data.path={data}/one_class"], "one_class holds no .tar archive"),
    (["--config.data.source=webdataset", "--config.data.path={data}/file"], "skipped: 1 damaged archives"),
    (["--mode=sample"], "there is no checkpoint in"),
    (["--mode=sample", "--checkpoint={tmp}/none"], "there is no checkpoint in .*/none"),
    (["--config.init_from={tmp}/none"], "there is no checkpoint in .*/none"),
    (["--config.init_from={run}", "--config.model.width=64"], "another model .*width: 32 there, 64 here"),
    (["--config.init_from={run}", "--config.loss.repa_weight=1", "--config.loss.repa_layer=1"], "trained without REPA"),
    ([SMOKE, "--config.model.name=jit", "--config.model.decoder_width=8"], "decoder_width; it .* this config's is jit"),
    ([SMOKE, "--config.model.name=unet"], "model.name='unet' is not"),
    (["--workdir={run}", "--config.model.depth=3"], r"checkpoints/2 is .* another model \(depth: 2 there, 3 here\)"),
    (["--workdir={run}", "--config.model.depth=3", "--mode=sample"], "another model .*depth: 2 there, 3 here"),
    (["--mode=report"], "no such workdir: .*/run; give the folder of a run"),
    (["--mode=report", "--workdir={data}"], "has no metrics.jsonl, so there is nothing to report"),
    ([*EVALUATE[:1]], "config.evaluate.inception is empty; give the path of the Inception weights"),
    ([*EVALUATE[:1], "--config.evaluate.inception={tmp}/none.pth"], "no Inception weights at .*/none.pth"),
    ([*EVALUATE, "--config.evaluate.samples={data}/good.npz"], "/file is damaged or no PyTorch file"),
    (EVALUATE, "there is no checkpoint in"),
    ([*EVALUATE, "--config.evaluate.samples={data}/keys.npz"], r"no images 'arr_0' .*: it holds 'mu', 'pictures'"),
    ([*EVALUATE, "--config.evaluate.samples={data}/floats.npz"], "float32 values; .* takes uint8 in 0..255"),
    ([*EVALUATE, "--config.evaluate.samples={data}/planes.npz"], r"shape \(4, 3, 8, 8\); expected \[images, height"),
    (
        [*EVALUATE, "--config.evaluate.samples={data}/good.npz", "--config.evaluate.reference={data}/keys.npz"],
        "keys.npz has 'mu' without the other of 'mu' and 'sigma'",
    ),
    (["--workdir={data}/file"], "/file is a file, or is below one"),
    (["--workdir={data}/file/run"], "/file/run is a file, or is below one"),
    (["--workdir={data}/file", "--mode=sample", "--checkpoint={run}"], "is a file, or is below one"),
    # A file system that takes no folders, not even from root.
    (["--workdir=/proc/run"], "/proc/run can't be written"),
    (["--workdir=/proc/run", "--mode=sample", "--checkpoint={run}"], "/proc/run/samples can't be written"),
    (["--config.data.batch_size=1048576", "--config.data.image_size=8192"], "needs at least .* GiB on each device"),
    (["--mode=sample", "--config.model.width=65536", "--config.model.depth=1024"], r"weights [\d,.]+, a batch"),
    (["--workdir={tmp}/{name}"], "is too long for a path; choose a shorter one"),
    (["--workdir={tmp}/{name}", "--mode=sample", "--checkpoint={run}"], "samples can't be written: File name too long"),
    (["--config.init_from={tmp}/{name}"], "is too long for a path"),
    (["--config.data.source=image_folder", "--config.data.path={path}"], "too long for a path|no such"),
    (["--checkpoint={path}"], "is too long for a path"),
    (["--workdir=~nobodyatall/run"], "~nobodyatall/run: there is no user nobodyatall with a home folder"),
    (["--config.teacher.path=~nobodyatall/w.pth"], "config.teacher.path=~nobodyatall/w.pth: there is no user"),
    (["--mode=encode"], "for text-to-image models, but config.model.text_width is 0"),
    (["--config.data.source=captioned_digits"], "the data has captions, but the model has 10 classes"),
]
TEXT = "--config=configs/t2i_256.py:smoke"
TEXTS = [
    (["--mode=encode"], "needs a folder to fill; set --config.text.features=FOLDER"),
    (["--config.text.encoder=qwen3"], "config.text.path is empty; download .*huggingface.co/Qwen/Qwen3-1.7B"),
    (["--config.text.encoder=qwen3", "--config.text.path={tmp}/none"], "no such folder, and Qwen3's weights"),
    (["--config.text.encoder=qwen3", "--config.text.path={tmp}"], "config.json: no such file"),
    (["--config.text.encoder=qwen3", "--mode=encode", "--config.text.features={tmp}/f"], "path is empty"),
    (["--config.text.features={tmp}/none"], "/none has no features .*run --mode=encode"),
    (["--config.sample.prompts={tmp}/none.txt"], "no such file of prompts: .*/none.txt"),
    (["--config.sample.images_per_prompt=2"], "images_per_prompt applies to config.sample.prompts, which is empty"),
    (["--config.sample.prompts={tmp}"], "a folder without .txt files"),
    (
        ["--config.sample.negative_prompt=fog", "--config.sample.guidance_average=ema"],
        "negative_prompt has no effect where guidance leads away from a weaker model",
    ),
    (["--config.data.source=digits"], "the data has 10 classes, but the model takes captions"),
    (["--mode=sample", "--config.sample.prompts=a cat"], "there is no checkpoint in"),
]


def refuse(*arguments: object, says: str, **options) -> None:
    """The command prints one line and exits with 1."""
    result = run_main(*arguments, timeout=120, **options)
    says_what_is_wrong(result.returncode, result.stderr, says)


def says_what_is_wrong(code: int, stderr: str, says: str) -> None:
    assert code == 1, stderr
    assert re.fullmatch(r"error: [^\n]+\n", stderr), stderr
    assert re.search(says, stderr), stderr


# Runs each command line in a fork of one interpreter that has imported everything: seconds instead of minutes.
LONG = {"name": "a" * 300, "path": "/" + "a/" * 3000}  # longer than file systems take

RUN_ALL = """
import json, os, sys, traceback
from absl import app
from deco_jax import main
from deco_jax.programs import sample, train
from deco_jax.run import lock
results = []
for arguments in json.load(sys.stdin):
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.dup2(write, 2)
        code = 1
        try:
            sys.argv = ["deco_jax.main", *arguments]
            app.run(main.main, flags_parser=main.parse)
            code = 0
        except SystemExit as stop:
            code = stop.code
        except BaseException:
            traceback.print_exc()
        sys.stderr.flush()
        lock._release_all()  # as at the end of a process
        os._exit(code)
    os.close(write)
    with os.fdopen(read) as stderr:
        said = stderr.read()
    results.append((os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said))
json.dump(results, open(sys.argv[1], "w"))
"""
CASES = FLAGS + [([SMOKE, *arguments], says) for arguments, says in VALUES + MACHINE]
CASES += [([TEXT, *arguments], says) for arguments, says in TEXTS]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Of each of CASES: its folder, its exit status, what it wrote to stderr."""
    folder, data = tmp_path_factory.mktemp("cases"), tmp_path_factory.mktemp("data")
    run = two_steps(data)
    for name in ("no_images", "one_class"):
        (data / name / "cat").mkdir(parents=True)
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(data / "one_class" / "cat" / "1.png")
    (data / "file").write_text("mine")
    (data / "list.json").write_text("[1, 2]")
    (data / "broken.json").write_text('{"model": ')
    (data / "newer.json").write_text('{"model": {"name": "deco", "colour": "red"}}')
    pictures = np.zeros((4, 8, 8, 3), np.uint8)
    np.savez(data / "good.npz", arr_0=pictures)
    np.savez(data / "keys.npz", pictures=pictures, mu=np.zeros(2048))
    np.savez(data / "floats.npz", arr_0=pictures.astype(np.float32))
    np.savez(data / "planes.npz", arr_0=pictures.transpose(0, 3, 1, 2))
    before = files(data)
    folders = [folder / str(i) for i in range(len(CASES))]
    commands = []
    for case, (arguments, _) in zip(folders, CASES, strict=True):
        (case / "empty").mkdir(parents=True)
        filled = [argument.format(tmp=case / "empty", data=data, run=run, **LONG) for argument in arguments]
        commands.append([f"--workdir={case / 'run'}", *filled])
    subprocess.run(
        [sys.executable, "-c", RUN_ALL, folder / "results"],
        input=json.dumps(commands),
        text=True,
        cwd=ROOT,
        timeout=240,
        check=True,
        capture_output=True,
    )
    assert files(data) == before
    results = json.loads((folder / "results").read_text())
    return [(case, code, said) for case, (code, said) in zip(folders, results, strict=True)]


@pytest.mark.parametrize("case", range(len(CASES)), ids=[" ".join(arguments) or "none" for arguments, _ in CASES])
def test_one_line(outcomes, case):
    folder, code, said = outcomes[case]
    says_what_is_wrong(code, said, CASES[case][1])
    assert [entry.name for entry in folder.iterdir()] == ["empty"]
    assert not any((folder / "empty").iterdir())


@pytest.mark.parametrize("arguments, says", [FLAGS[3], FLAGS[5], FLAGS[8], FLAGS[17], *CASES[len(FLAGS) :: 6][:3]])
def test_as_a_command(tmp_path, arguments, says):
    """The same, each in an interpreter of its own."""
    refuse(*arguments, f"--workdir={tmp_path / 'run'}", says=says)
    assert not any(tmp_path.iterdir())


def test_missing_workdir():
    refuse(SMOKE, says="--workdir is missing")


@pytest.mark.parametrize(
    "program, says",
    [
        ("raise RuntimeError('boom\\nand more')", "bad.py could not be read: boom and more"),
        ("def get_config(:", "bad.py could not be read: invalid syntax"),
        ("def get_config():\n    return {}['nope']", "bad.py could not be read: .*nope"),
        ("open('/nowhere/at/all')", "bad.py could not be read: .*nowhere"),
        ("import ml_collections as m\ndef get_config():\n    return m.ConfigDict()", "config.seed is missing"),
    ],
)
def test_config_that_fails_itself(tmp_path, program, says):
    (tmp_path / "bad.py").write_text(program)
    refuse(f"--config={tmp_path / 'bad.py'}", f"--workdir={tmp_path / 'run'}", says=says)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("item", ["ema", "config"])
def test_damaged_checkpoint_to_sample_from(tmp_path, item):
    workdir = two_steps(tmp_path)
    for file in (workdir / "checkpoints" / "2" / item).rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[:7])
    refuse(SMOKE, f"--workdir={workdir}", "--mode=sample", says="checkpoints/2 can't be read: .*choose another")
    assert not (workdir / "samples").exists()


def test_no_readable_checkpoint_to_resume_from(tmp_path):
    workdir = two_steps(tmp_path)
    for step in (1, 2):
        shutil.rmtree(workdir / "checkpoints" / str(step) / "params" / "d")
        shutil.rmtree(workdir / "checkpoints" / str(step) / "params" / "ocdbt.process_0")
    before = files(workdir)
    result = run_main(SMOKE, f"--workdir={workdir}", NO_SAMPLES)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert "none of the checkpoints" in result.stderr.splitlines()[-1]
    assert files(workdir) == before


def test_disk_that_fills_while_saving(tmp_path):
    """A limit on the size of files stands in for the disk: the write fails in the same place, with EFBIG."""
    workdir = two_steps(tmp_path)
    before = files(workdir / "checkpoints" / "2")
    metrics = rows(workdir)
    command = [SMOKE, f"--workdir={workdir}", NO_SAMPLES]
    succeed(SMOKE, f"--workdir={tmp_path / 'whole'}", NO_SAMPLES)  # also fills the compile cache

    # The compile cache is read but not written: it would keep the truncated entry. The limit is the shell's, in KiB: to
    # set it in a fork of this process is what JAX warns of.
    result = run_main(
        *command,
        prefix=("bash", "-c", 'ulimit -f 20; exec "$@"', "bash"),
        env={"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1e9"},
    )
    assert result.returncode == 1, (result.stdout, result.stderr)
    assert re.fullmatch(r"error: writing .* failed: [^\n]*free space[^\n]*step 2 is intact[^\n]*\n", result.stderr)
    assert files(workdir / "checkpoints" / "2") == before

    succeed(*command)
    assert steps(workdir) == ["1", "2", "4"]
    assert {step: row["loss"] for step, row in rows(workdir).items()} == {
        step: row["loss"] for step, row in rows(tmp_path / "whole").items()
    }
    assert rows(workdir)[2] == metrics[2]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1.5 MB, where one may be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    if (
        not mount
        or subprocess.run([mount, "-t", "tmpfs", "-o", "size=1500k", "tmpfs", folder], capture_output=True).returncode
    ):
        pytest.skip("mounting a small disk needs root")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_small_disk(small_disk):
    command = [SMOKE, f"--workdir={small_disk / 'run'}", NO_SAMPLES, "--config.train.save_every=1"]
    refuse(*command, says="writing .* failed: .*free space")


# A limit on the size of files, in KiB, in place of a full disk; the compile cache is read but not written.
FULL = ("bash", "-c", 'ulimit -f "$0"; exec "$@"')
NO_CACHE = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1e9"}


def test_disk_that_fills_while_encoding(tmp_path):
    features = tmp_path / "features"
    command = ["--config=configs/t2i_256.py:smoke", "--mode=encode", f"--config.text.features={features}"]
    succeed(*command, f"--workdir={tmp_path}", f"--config.text.features={tmp_path / 'whole'}")
    result = run_main(*command, f"--workdir={tmp_path}", prefix=(*FULL, "20"), env=NO_CACHE)
    assert result.returncode == 1, (result.stdout, result.stderr)
    assert re.fullmatch(
        rf"error: writing to {features}/features_00000.npy failed: File too large; [^\n]*\n", result.stderr
    )
    assert not list(features.glob("*.part"))


def test_disk_that_fills_under_a_grid_and_the_checkpoint_being_written(tmp_path):
    result = run_main(SMOKE, f"--workdir={tmp_path / 'run'}", prefix=(*FULL, "12"), env=NO_CACHE)
    assert result.returncode == 1, (result.stdout, result.stderr)
    assert re.fullmatch(r"error: writing [^\n]*failed: File too large; free space[^\n]*\n", result.stderr)


def test_disk_that_fills_while_importing(tmp_path):
    settings = ("model.width=48", "model.patch_size=4", "model.decoder_width=16", "data.image_size=16")
    command = ["--config=configs/imagenet256.py:smoke", *(f"--config.{setting}" for setting in settings)]
    command += ["--mode=import", f"--source={GOLDEN / 'lightning.ckpt'}", f"--workdir={tmp_path / 'run'}"]
    result = run_main(*command, prefix=(*FULL, "20"), env=NO_CACHE)
    assert result.returncode == 1, (result.stdout, result.stderr)
    assert re.fullmatch(r"error: writing [^\n]*failed: [^\n]*free space[^\n]*\n", result.stderr)
    assert [path.name for path in (tmp_path / "run").rglob("*")] == ["checkpoints"]
    succeed(*command)
