"""The command line: flags, platform, and which program a mode is. Nothing else.

python -m deco_jax.main --config=configs/NAME.py[:VARIANT] --workdir=DIR [--mode=MODE] [--config.KEY=VALUE ...]
"""

from __future__ import annotations

import difflib
import errno
import os
import re
import sys
import time
import traceback
from typing import Any

# Data workers import this file again: everything heavy is imported inside the functions.
from absl import app, flags
from ml_collections import config_flags

from deco_jax import config_files

_STARTED = time.monotonic()

MODES = (
    "train",
    "sample",
    "encode",
    "evaluate",
    "spectrum",
    "report",
    "demo",
    "compile",
    "benchmark",
    "import",
    "export",
)

_CONFIG = config_flags.DEFINE_config_file("config", help_string="configs/NAME.py, or configs/NAME.py:VARIANT.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: checkpoints, metrics, samples.")
_MODE = flags.DEFINE_enum("mode", "train", MODES, "What to do.")
_SOURCE = flags.DEFINE_string("source", "", "import: the official checkpoint, a .ckpt file.")
_TOPOLOGY = flags.DEFINE_string(
    "topology", "", "compile: the machine to compile for, such as v5e:16x16 or cpu:8; this one if empty."
)
_PORT = flags.DEFINE_integer(
    "port", 7860, "demo: of the page on 127.0.0.1; 0: any that is free.", lower_bound=0, upper_bound=65535
)
_COORDINATOR = flags.DEFINE_string("coordinator", "", "Several processes: HOST:PORT of process 0.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", 0, "Several processes: how many.")
_PROCESS_ID = flags.DEFINE_integer("process_id", -1, "Several processes: which one this is, from 0.")
_DISTRIBUTED = flags.DEFINE_bool("distributed", False, "Join the other hosts of a TPU pod; SLURM and MPI are noticed.")
_TIMEOUT = flags.DEFINE_integer("distributed_timeout", 300, "Seconds that each stage of joining may take.")
_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", "", "Checkpoint to read instead of the workdir's newest; train: to go on from in a new workdir."
)

# Modes that run the model on this machine.
COMPUTING = ("train", "sample", "evaluate", "spectrum", "demo", "benchmark")
# Flags that only some modes read.
READ_BY = {
    "checkpoint": ("train", "sample", "evaluate", "spectrum", "demo", "export"),
    "source": ("import",),
    "topology": ("compile",),
}


def parse(argv: list[str]) -> list[str]:
    """Flags by absl and the config's overrides; a mistake is one line and exit status 1."""
    config_files.make_importable()
    path = _config_argument(argv)
    if path is not None and not os.path.isfile(path.split(":")[0]):
        _fail(f"no config {path!r}; see the files in configs/")
    try:
        rest = flags.FLAGS(argv)
        if path is not None:
            _settings()  # an OSError of the config file waits for the first look
    except flags.IllegalFlagValueError as error:
        _fail(_wrong_value(path, error))
    except flags.Error as error:
        _fail(str(error))
    except Exception as error:  # a key that isn't there, or the config file, which is a program of its own
        _fail(_unknown_key(argv, path) or f"the config {path} could not be read: {error}")
    if len(rest) > 1:
        _fail(f"unexpected argument {rest[1]!r}; settings are given as --config.KEY=VALUE")
    if path is None:
        _fail("--config is missing; start with --config=configs/quickstart.py")
    if not _WORKDIR.value:
        _fail("--workdir is missing; give a folder, for example --workdir=runs/first")
    return rest


def _config_argument(argv: list[str]) -> str | None:
    """The last value of --config, as absl reads it."""
    value = None
    for i, argument in enumerate(argv):
        if match := re.match(r"--?config(=|$)(.*)", argument):
            value = match[2] if match[1] else "".join(argv[i + 1 : i + 2])
    return value


def _settings() -> dict[str, Any]:
    """The config as it stands, by dotted key."""
    from deco_jax.config import flatten

    return flatten(_CONFIG.value.to_dict()) if _CONFIG.value is not None else {}


def _wrong_value(path: str | None, error: flags.IllegalFlagValueError) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    if lines[0].startswith("flag --config="):  # ends with the traceback's last line, "ValueError: ..."
        return f"the config {path} could not be read: {lines[-1].partition(': ')[2] or lines[-1]}"
    key = re.match(r"flag --config\.([\w.]+)=", lines[0])
    default = _settings().get(key[1]) if key else None
    return " ".join(lines) + ("" if default is None else f"; it takes a value like {default}")


def _unknown_key(argv: list[str], path: str | None) -> str:
    """What is wrong with the first override of a key that the config hasn't; "" if there is none."""
    from deco_jax.config import flatten

    try:  # without the overrides
        default: Any = flags.FLAGS["config"].parser.parse(path or "")
        known = flatten(default.to_dict())
    except Exception:  # then it isn't the overrides
        return ""
    for given in (match[1] for argument in argv if (match := re.match(r"--?(?:no)?config\.([\w.]+)", argument))):
        if given not in known and not any(key.startswith(f"{given}.") for key in known):
            close = difflib.get_close_matches(given, known, n=1)
            remedy = f"did you mean --config.{close[0]}?" if close else "see the config file"
            return f"there is no setting --config.{given}; {remedy}"
    return ""


def _fail(message: str) -> None:
    print("error: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(1)


def main(_: list[str]) -> None:
    code: int | None = None
    try:
        _run()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if not _several_processes():
            raise
    except BaseException:
        if not _several_processes():
            raise
        traceback.print_exc()
        code = 1
    if _several_processes():
        from deco_jax.run import distributed

        distributed.leave(code or 0)


def _several_processes() -> bool:
    """Whether this process joined others; without starting JAX only to ask."""
    if "jax" not in sys.modules:
        return False
    import jax

    return jax.distributed.is_initialized()


def _run() -> None:
    from absl import logging

    from deco_jax import config as config_lib
    from deco_jax.errors import UserError
    from deco_jax.run.hardware import set_xla_flags

    logging.set_verbosity(logging.WARNING)
    set_xla_flags()
    # The shell leaves the ~ of --workdir=~/runs alone.
    workdir, checkpoint, source = (os.path.expanduser(flag.value or "") for flag in (_WORKDIR, _CHECKPOINT, _SOURCE))
    try:
        for flag, modes in READ_BY.items():
            if flags.FLAGS[flag].value and _MODE.value not in modes:
                raise UserError(f"--mode={_MODE.value} doesn't read --{flag}, only {', '.join(modes)}; leave it out")
        config_lib.check(_CONFIG.value)
        config_lib.settle_image_size(_CONFIG.value)
        config_lib.settle_paths(_CONFIG.value, workdir=workdir, checkpoint=checkpoint, source=source)
        if _MODE.value not in ("compile", "report"):
            from deco_jax.run import distributed

            distributed.start(
                _COORDINATOR.value,
                _NUM_PROCESSES.value,
                _PROCESS_ID.value,
                _TIMEOUT.value,
                _DISTRIBUTED.value,
                preemptible=_MODE.value == "train",
            )
        if _MODE.value in COMPUTING:
            from deco_jax.run.hardware import check_attention

            check_attention(_CONFIG.value.model.attention)
        if _MODE.value == "train":
            from deco_jax.programs.train import train

            train(_CONFIG.value, workdir, checkpoint)
        elif _MODE.value == "sample":
            from deco_jax.programs.sample import sample

            sample(_CONFIG.value, workdir, checkpoint)
        elif _MODE.value == "encode":
            from deco_jax.programs.encode import encode

            encode(_CONFIG.value, workdir)
        elif _MODE.value == "evaluate":
            from deco_jax.programs.evaluate import evaluate

            evaluate(_CONFIG.value, workdir, checkpoint)
        elif _MODE.value == "spectrum":
            from deco_jax.programs.spectrum import spectrum

            spectrum(_CONFIG.value, workdir, checkpoint)
        elif _MODE.value == "report":
            from deco_jax.programs.report import report

            report(_CONFIG.value, workdir)
        elif _MODE.value == "demo":
            from deco_jax.programs.demo import demo

            demo(_CONFIG.value, workdir, checkpoint, _PORT.value)
        elif _MODE.value == "compile":
            from deco_jax.programs.compile import compile_step

            compile_step(_CONFIG.value, workdir, _TOPOLOGY.value)
        elif _MODE.value == "benchmark":
            from deco_jax.programs.benchmark import benchmark

            benchmark(_CONFIG.value, workdir, time.monotonic() - _STARTED)
        elif _MODE.value == "import":
            from deco_jax.programs.convert import import_checkpoint

            import_checkpoint(_CONFIG.value, workdir, source)
        elif _MODE.value == "export":
            from deco_jax.programs.convert import export_checkpoint

            export_checkpoint(_CONFIG.value, workdir, checkpoint)
    except UserError as error:
        _fail(str(error))
    except KeyboardInterrupt:  # before or between what can be saved
        print("interrupted; the same command goes on from what is saved", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        _fail(f"writing to {workdir} failed: {error.strerror}; free space there and start again")


def cli() -> None:
    """Run the command `deco-jax`, which is `python -m deco_jax.main`."""
    app.run(main, flags_parser=parse)


if __name__ == "__main__":
    cli()
