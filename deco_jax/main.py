"""The entry point: flags, platform, and the program of each mode. Nothing else.

python -m deco_jax.main --config=configs/NAME.py[:VARIANT] --workdir=DIR [--mode=MODE] [--config.KEY=VALUE ...]
"""

from __future__ import annotations

import errno
import importlib
import os
import sys
import time
import traceback
from typing import Any, NamedTuple

from deco_jax import interrupts

if __name__ == "__main__":
    interrupts.end_at_once()

# Data workers import this file again: everything heavy is imported inside the functions.
from absl import app, flags
from ml_collections import config_flags

from deco_jax import command_line
from deco_jax.command_line import parse

_STARTED = time.monotonic()


class Mode(NamedTuple):
    """What --mode=NAME does."""

    program: str  # MODULE:FUNCTION, called with the config, the workdir and the flags that it reads
    about: str
    reads: tuple[str, ...] = ()  # flags, in the order of the function's arguments
    computes: bool = False  # runs the model on this machine
    trains: bool = False  # trains, and so needs the memory for that
    draws: bool = False  # draws images of size config.data.image_size
    joins: bool = True  # joins the other processes of a run on several hosts


MODES = {
    "train": Mode(
        "train:train",
        "Train. If started again in the same workdir, it continues from the newest checkpoint.",
        ("checkpoint",),
        computes=True,
        trains=True,
    ),
    "sample": Mode("sample:sample", "Draw images from a checkpoint.", ("checkpoint",), computes=True, draws=True),
    "prepare": Mode("prepare:prepare", "Write the images of the data once, as shards that training reads quickly."),
    "encode": Mode("encode:encode", "Encode the captions of the data once, for training to read."),
    "evaluate": Mode(
        "evaluate:evaluate", "Measure FID, sFID, IS, precision and recall.", ("checkpoint",), computes=True, draws=True
    ),
    "spectrum": Mode(
        "spectrum:spectrum",
        "Plot the spectra of the transformer's output and of the velocity.",
        ("checkpoint",),
        computes=True,
    ),
    "report": Mode("report:report", "Write an HTML page about a run, or about several side by side.", joins=False),
    "demo": Mode("demo:demo", "Serve a web page that draws images.", ("checkpoint", "port"), computes=True, draws=True),
    "compile": Mode(
        "compile:compile_program",
        "Compile a program, also for a machine you don't have; say whether it fits and how fast it would be.",
        ("topology", "what", "search"),
        joins=False,
    ),
    "benchmark": Mode(
        "benchmark:benchmark",
        "Time training, sampling and reading data.",
        ("import_seconds",),
        computes=True,
        trains=True,
    ),
    "import": Mode("convert:import_checkpoint", "Read an official PyTorch checkpoint.", ("source",)),
    "export": Mode(
        "convert:export_checkpoint", "Write a checkpoint as PyTorch's and safetensors files.", ("checkpoint",)
    ),
}


_CONFIG = config_flags.DEFINE_config_file("config", help_string="Name or file of a config, or a run's config.json.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: checkpoints, metrics, samples.")
_MODE = flags.DEFINE_enum("mode", "train", list(MODES), "What to do; see above.")
_SOURCE = flags.DEFINE_string("source", "", "import: the official checkpoint, a .ckpt file (JiT: .pth).")
_TOPOLOGY = flags.DEFINE_string(
    "topology", "", "compile: the machine to compile for, such as v5e:16x16 or cpu:8; empty: this one."
)
_WHAT = flags.DEFINE_enum(
    "what",
    "train",
    ("train", "sample", "evaluate"),
    "compile: the training step, the sampler or the Inception network.",
)
_SEARCH = flags.DEFINE_bool("search", False, "compile: try meshes, remat, unroll and batch sizes; print a table.")
_PORT = flags.DEFINE_integer(
    "port", 7860, "demo: port of the page on 127.0.0.1; 0: any free one.", lower_bound=0, upper_bound=65535
)
_COORDINATOR = flags.DEFINE_string("coordinator", "", "Several processes: HOST:PORT of process 0.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", 0, "Several processes: their number.")
_PROCESS_ID = flags.DEFINE_integer("process_id", -1, "Several processes: the number of this one, from 0.")
_DISTRIBUTED = flags.DEFINE_bool("distributed", False, "Join the other hosts of a TPU pod; SLURM and MPI are detected.")
_TIMEOUT = flags.DEFINE_integer("distributed_timeout", 300, "Seconds that each stage of joining may take.")
_HEARTBEAT = flags.DEFINE_integer(
    "heartbeat_timeout", 30, "Seconds of silence of one process after which the others end with status 75."
)
_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", "", "Checkpoint to read instead of the workdir's newest; train: to continue from in a new workdir."
)


# The message by whether the mode trains.
OUT_OF_MEMORY = {
    True: "a device is out of memory; raise --config.optimizer.accumulate_steps or --config.mesh.fsdp, set "
    "--config.model.remat=full, or lower --config.data.batch_size; --mode=compile --search shows what fits",
    False: "a device is out of memory; lower the batch_size of what this mode draws or measures (config.sample, "
    "config.evaluate, config.spectrum), or raise --config.mesh.fsdp",
}


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
    """Return whether this process joined others, without starting JAX only to ask."""
    if "jax" not in sys.modules:
        return False
    import jax

    return jax.distributed.is_initialized()


def _run() -> None:
    from absl import logging

    from deco_jax import config as config_lib
    from deco_jax.errors import UserError
    from deco_jax.run.hardware import keep_compiled_programs, set_xla_flags

    mode = MODES[_MODE.value]
    logging.set_verbosity(logging.WARNING)
    set_xla_flags()
    keep_compiled_programs()
    # The shell doesn't expand the ~ in --workdir=~/runs.
    workdir, checkpoint, source = (os.path.expanduser(flag.value or "") for flag in (_WORKDIR, _CHECKPOINT, _SOURCE))
    try:
        for flag in ("checkpoint", "source", "topology", "what", "search", "port"):
            if flags.FLAGS[flag].value != flags.FLAGS[flag].default and flag not in mode.reads:
                readers = ", ".join(name for name, other in MODES.items() if flag in other.reads)
                raise UserError(f"--mode={_MODE.value} doesn't read --{flag}, only {readers}; leave it out")
        if checkpoint and mode.trains and _CONFIG.value.init_from and "init_from" not in command_line.overridden():
            print(
                f"--checkpoint continues a run, so config.init_from={_CONFIG.value.init_from} is left out", flush=True
            )
            _CONFIG.value.init_from = ""
        config_lib.check(_CONFIG.value)
        config_lib.settle_image_size(_CONFIG.value)
        config_lib.settle_paths(_CONFIG.value, workdir=workdir, checkpoint=checkpoint, source=source)
        if mode.draws:
            from deco_jax.run.settings import check_drawn

            check_drawn(_CONFIG.value, command_line.overridden(), workdir, checkpoint)
        if mode.joins:
            from deco_jax.run import distributed

            distributed.start(
                _COORDINATOR.value,
                _NUM_PROCESSES.value,
                _PROCESS_ID.value,
                _TIMEOUT.value,
                _DISTRIBUTED.value,
                preemptible=_MODE.value == "train",
                heartbeat_timeout=_HEARTBEAT.value,
            )
        if mode.computes:
            from deco_jax.run.hardware import check_attention
            from deco_jax.run.memory import check_memory

            check_attention(_CONFIG.value.model)
            check_memory(_CONFIG.value, mode.trains)
        module, _, function = mode.program.partition(":")
        program = getattr(importlib.import_module(f"deco_jax.programs.{module}"), function)
        given: dict[str, Any] = {
            "checkpoint": checkpoint,
            "source": source,
            "topology": _TOPOLOGY.value,
            "port": _PORT.value,
        }
        given |= {"what": _WHAT.value, "search": _SEARCH.value}
        given["import_seconds"] = time.monotonic() - _STARTED
        arguments = [given[name] for name in mode.reads]
        if mode.joins:
            with distributed.ending_with_the_others():
                program(_CONFIG.value, workdir, *arguments)
        else:
            program(_CONFIG.value, workdir, *arguments)
    except UserError as error:
        command_line.fail(str(error))
    except KeyboardInterrupt:  # before there was anything to save, or in between
        interrupts.end()
    except Exception as error:
        from deco_jax.run import files, storage

        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
            command_line.fail(f"{str(error.filename or workdir)[:80]}... is too long for a path; choose a shorter one")
        if isinstance(error, OSError) and error.errno in files.FULL:
            where = error.filename or workdir
            command_line.fail(f"writing to {where} failed: {error.strerror}; free space there and start again")
        if "RESOURCE_EXHAUSTED" in str(error):
            command_line.fail(OUT_OF_MEMORY[mode.trains])
        if line := storage.refusal(error):
            command_line.fail(line)
        raise


def cli() -> None:
    """Run the command `deco-jax`, which is `python -m deco_jax.main`."""
    if command_line.asks_for_help(sys.argv):
        print(command_line.help_text({name: mode.about for name, mode in MODES.items()}))
        return
    interrupts.raise_always()
    try:
        app.run(main, flags_parser=parse)
    except KeyboardInterrupt:  # before the program began, or while it ended
        interrupts.end()


if __name__ == "__main__":
    cli()
