"""Several hosts as one program: joining, agreeing and leaving; names the stage in which a start hangs."""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from deco_jax.data.source import Source
from deco_jax.errors import UserError, reason

# A stage that takes longer says so, again and again.
REMINDER_SECONDS = 60.0
# Exit status of a run that can go on if it is started again: it was asked to stop, or another process or a device no
# longer answers. EX_TEMPFAIL of sysexits.h. Launchers restart such a run; 1 means an error that would happen again.
RESTART = 75
# Kinds of errors that are the program's own, and would happen again.
OF_THE_PROGRAM = ("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT", "UNIMPLEMENTED")
# Waiting for another host's compilation may take long.
BARRIER_SECONDS = 3600


def several_tasks(environment: Mapping[str, str]) -> bool:
    """Return whether a scheduler started this process as one of several: srun, mpirun, or a TPU slice's runtime."""
    counts = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
    if any(environment.get(name, "1").strip() not in ("", "0", "1") for name in counts):
        return True
    return "," in environment.get("TPU_WORKER_HOSTNAMES", "")


def start(
    coordinator: str = "",
    num_processes: int = 0,
    process_id: int = -1,
    timeout: int = 300,
    forced: bool = False,
    preemptible: bool = False,
    heartbeat_timeout: int = 30,
) -> None:
    """Join the other processes, if there are any, before anything touches a device.

    Args:
        coordinator: host:port of process 0, given with the next two; empty: ask the environment (SLURM, MPI, TPU
            slice).
        num_processes, process_id: the number of processes, and the number of this one.
        timeout: seconds for each stage; after that, the process names the stage and ends with status 1.
        forced: join even if nothing in the environment indicates several tasks (a TPU pod's virtual machines).
        preemptible: JAX's preemption service handles SIGTERM, so that `preemption.Watch` can ask it; otherwise SIGTERM
            ends the process as usual.
        heartbeat_timeout: seconds of silence after which another process counts as lost, and this one ends, too.

    Raises:
        UserError: the flags contradict each other, or the other processes can't be joined.
    """
    explicit = bool(coordinator) or num_processes > 0 or process_id >= 0
    if timeout < 1:
        raise UserError(f"--distributed_timeout={timeout} must be at least 1 second")
    if heartbeat_timeout < 1:
        raise UserError(f"--heartbeat_timeout={heartbeat_timeout} must be at least 1 second")
    if explicit:
        if not (coordinator and num_processes > 0 and 0 <= process_id < num_processes):
            raise UserError(
                f"--coordinator={coordinator or '?'} --num_processes={num_processes} --process_id={process_id}: "
                "give all three: HOST:PORT of process 0, the number of processes, and the number of this one from 0"
            )
        if not coordinator.rpartition(":")[2].isdigit():
            raise UserError(f"--coordinator={coordinator} needs a port, as in 10.0.0.1:12345")
    elif not (forced or several_tasks(os.environ)):
        return

    who = f"process {process_id} of {num_processes}" if explicit else "this process"
    where = f"to the coordinator {coordinator}" if explicit else "as the environment says"
    jax.config.update("jax_enable_preemption_service", preemptible)
    with stage(f"connecting {where}", timeout, who):
        # `stage` ends a process that waits too long, with a clear line that JAX wouldn't print.
        times: Any = {"initialization_timeout": timeout + 60, "heartbeat_timeout_seconds": heartbeat_timeout}
        try:
            with _ending_in_one_line():
                if explicit:
                    jax.distributed.initialize(coordinator, num_processes=num_processes, process_id=process_id, **times)
                else:
                    jax.distributed.initialize(**times)
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"could not join the other processes: {reason(error, 300)}; "
                "check --coordinator, --num_processes and --process_id, or the scheduler's environment"
            ) from error
    with stage("starting the devices", timeout):
        local, everywhere = jax.local_device_count(), jax.device_count()
    with stage(f"waiting for all {jax.process_count()} hosts ({local} of {everywhere} devices are here)", timeout):
        multihost_utils.sync_global_devices("start")


@contextlib.contextmanager
def stage(name: str, limit: float | None = None, who: str = "") -> Iterator[None]:
    """Log a stage of the start on every host: its beginning, its end with seconds, and a reminder every minute.

    Args:
        limit: seconds after which the process ends with status 1.
        who: names the process before JAX can; given if there are certainly several processes.
    """
    if not who and jax.process_count() > 1:
        who = f"host {jax.process_index()} of {jax.process_count()}"
    prefix = f"[{who}, {socket.gethostname()}] " if who else ""
    if who:
        print(f"{prefix}{name} ...", file=sys.stderr, flush=True)
    began, finished = time.monotonic(), threading.Event()

    def watch() -> None:
        while True:
            left = REMINDER_SECONDS if limit is None else began + limit - time.monotonic()
            if finished.wait(max(0.0, min(left, REMINDER_SECONDS))):
                return
            spent = time.monotonic() - began
            if limit is not None and spent >= limit:
                print(
                    f"error: {prefix}still {name} after {spent:.0f} s (--distributed_timeout); "
                    "is every other process running and reachable from here?",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(1)
            print(f"{prefix}still {name}, {spent:.0f} s", file=sys.stderr, flush=True)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        finished.set()
        thread.join()
    if who:
        print(f"{prefix}{name}: {time.monotonic() - began:.1f} s", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _ending_in_one_line() -> Iterator[None]:
    """Make a client of JAX's coordination service that is created in here end the process with one line and RESTART.

    By default it aborts, with stacks of C++ and Python, when the service reports a lost process or is silent. JAX has
    no setting for this. Its extension accepts a function to call instead, but fails to pass the reason to it, so C++
    calls its terminate handler, which is set here. Versions that work differently still abort.
    """
    try:
        from jax._src.lib import _jax

        make = _jax.get_distributed_runtime_client
        _on_terminate()
    except (ImportError, AttributeError, OSError):
        yield
        return

    def making(*args: Any, **options: Any) -> Any:
        try:
            return make(*args, **{"missed_heartbeat_callback": _lost, **options})
        except TypeError:
            return make(*args, **options)

    _jax.get_distributed_runtime_client = making
    try:
        yield
    finally:
        _jax.get_distributed_runtime_client = make


def _lost(*_: object) -> None:
    end_for_restart("another process of this run is gone or can't be reached")


_handlers: list[object] = []  # keeps ctypes' functions alive, because C++ points to them


def _on_terminate() -> None:
    """Make std::terminate, where exceptions in the runtime's threads end, call `_lost`."""
    handler = ctypes.CFUNCTYPE(None)(_lost)
    set_terminate = ctypes.CDLL("libstdc++.so.6")._ZSt13set_terminatePFvvE
    set_terminate.restype = ctypes.c_void_p
    set_terminate(handler)
    _handlers.append(handler)


def end_for_restart(reason: str) -> NoReturn:
    """End this process at once, with a line: the others don't answer, so nothing can be finished together."""
    from jax._src import distributed as jax_distributed

    # Asking JAX itself would start its devices if they aren't started yet.
    joined = jax_distributed.global_state
    who = f"process {joined.process_id} of {joined.num_processes}, {socket.gethostname()}"
    line = (
        f"error: [{who}] {reason}; ending with status {RESTART}: start all processes again to continue from the "
        "newest checkpoint\n"
    )
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        os.write(2, line.encode())
    os._exit(RESTART)


@contextlib.contextmanager
def ending_with_the_others() -> Iterator[None]:
    """End this process with RESTART if a transfer between processes fails in here, because one of them is gone."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1 or any(kind in str(error) for kind in OF_THE_PROGRAM):
            raise
        end_for_restart(f"a transfer between the processes failed ({' '.join(str(error).split())[:200]})")


def wait_for_all(name: str) -> None:
    """Return when all processes are here; a hundred times more patient than the first transfer between CPUs."""
    if jax.process_count() == 1:
        return
    from jax._src import distributed as jax_distributed

    client = jax_distributed.global_state.client
    if client is not None:
        client.wait_at_barrier(f"deco_jax_{name}", BARRIER_SECONDS * 1000)


def on_main_host(action: Callable[[], None]) -> None:
    """Do something on the first host only; return on all hosts when it is done.

    Raises:
        UserError: it failed there; that host has the reason.
    """
    if jax.process_count() == 1:
        action()
        return
    failure: BaseException | None = None
    if jax.process_index() == 0:
        try:
            action()
        except (UserError, OSError) as error:
            failure = error
    if from_main_host(failure is not None):
        raise failure or UserError("the first host failed; its log says why")


def on_every_host(action: Callable[[], None]) -> None:
    """Do something without transfers between the hosts on each of them; return if it succeeded on all.

    So no host goes on to transfers that the others will not take part in.

    Raises:
        UserError: it failed with one, here or on another host, which has the reason.
        Exception: any other failure here.
        OSError: any other failure, on another host.
    """
    if jax.process_count() == 1:
        action()
        return
    failure: Exception | None = None
    try:
        action()
    except Exception as error:
        failure = error
    ours = 0 if failure is None else 2 if isinstance(failure, UserError) else 1
    worst = int(np.max(multihost_utils.process_allgather(np.asarray(ours, np.int32))))
    if not worst:
        return
    if failure is not None and ours == worst:
        raise failure
    raise (UserError if worst == 2 else OSError)("another host failed here, and its log says why")


def from_main_host(value: int | bool) -> int:
    """Return the first host's value on all hosts."""
    if jax.process_count() == 1:
        return int(value)
    return int(multihost_utils.broadcast_one_to_all(np.asarray(int(value), np.int32)))


def array_from_main_host(value: np.ndarray) -> np.ndarray:
    """Return the first host's array on all hosts; each host passes one of the same shape and type."""
    if jax.process_count() == 1:
        return value
    return np.asarray(multihost_utils.broadcast_one_to_all(value))


def all_hosts(value: bool) -> bool:
    """Return whether `value` is true on all hosts."""
    if jax.process_count() == 1:
        return value
    return bool(np.all(multihost_utils.process_allgather(np.asarray(value))))


def sum_of_hosts(value: int) -> int:
    """Return the sum of all hosts' values on all hosts."""
    if jax.process_count() == 1:
        return value
    return int(np.sum(multihost_utils.process_allgather(np.asarray(value, np.int32))))


def same_on_all_hosts(text: str) -> bool:
    """Return whether all hosts have the same text as the first one."""
    ours = zlib.crc32(text.encode("utf-8", "surrogatepass")) >> 1
    return all_hosts(from_main_host(ours) == ours)


def check_same_data(source: Source) -> None:
    """Raise UserError unless all hosts list the same samples, because each reads its share of one order of them."""
    spread = np.linspace(0, len(source) - 1, min(len(source), 1000)).astype(int)
    listing = [str(len(source)), *source.class_names, *(source.name(int(i)) for i in spread)]
    if not same_on_all_hosts("\n".join(listing)):
        raise UserError(
            f"the hosts don't list the same images (here {len(source):,} in {len(source.class_names):,} classes); "
            "give all of them the same copy of the data at the same path"
        )


def leave(code: int, timeout: float = 60.0) -> NoReturn:
    """End this process, one of several: once the others are done, too, if all went well or all stop, or else at once.

    The interpreter's own shutdown is skipped, because it can hang while threads of the runtime are still running.
    """
    if code in (0, RESTART):
        late = threading.Timer(timeout, os._exit, [code])
        late.daemon = True
        late.start()
        with contextlib.suppress(RuntimeError):
            jax.distributed.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
