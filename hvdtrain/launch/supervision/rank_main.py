"""Run the user's script as one rank under a guard process; the MPI launcher starts this module for each rank.

    mpirun -np 4 python -m hvdtrain.launch.supervision.rank_main train.py --epochs 3

Under `hvdtrain run` the guard relays output and failures to the launcher. If it is started directly, for example
with `srun` in a batch script, it prints the lines of each rank with a `[rank]` prefix, except those of rank 0, and
a failure of one rank still ends all ranks.
"""

from hvdtrain import safe_path

safe_path.leave_working_directory()

import contextlib
import ctypes
import faulthandler
import json
import os
import select
import shlex
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from hvdtrain import cores, heartbeat, script, settings, stop_request, topology
from hvdtrain.collectives.mpi.library import load_wheel
from hvdtrain.launch.supervision import protocol
from hvdtrain.launch.supervision.rank_guard import Guard, Link, Pipes, Terminal
from hvdtrain.launch.supervision.rank_monitor import STACKS
from hvdtrain.patching import AfterImport, replace

PR_SET_PDEATHSIG = 1
SUCCESS: dict[str, Any] = {"done": True, "code": 0, "text": "", "traceback": ""}


class StockHorovodExit(SystemExit):
    """Raised if the script initializes stock Horovod with Keras 3: each rank would train a separate model."""


def main() -> None:
    """Run the script named on the command line as one rank, and exit with its exit code."""
    if len(sys.argv) < 2:
        sys.exit("Expected a script: python -m hvdtrain.launch.supervision.rank_main script.py [args]")
    command = protocol.unpack_command(sys.argv[1:])
    reading, (stdout, stderr, reports, crash, stacks) = zip(*(os.pipe() for _ in range(5)), strict=True)
    awaited, receipt = os.pipe()
    place = topology.detect()
    page = heartbeat.share()
    child = os.fork()
    for end in (stdout, stderr, reports, crash, stacks, awaited) if child else (*reading, receipt):
        os.close(end)
    if child:
        link = _link(place)
        if link.socket is not None:
            heartbeat.watch(page)
        # With --wrap only rank 0 prints, as a single process would, also messages of TensorFlow's C++ code.
        quiet = bool(place and place.rank) and command[:2] == ["-m", "hvdtrain.wrap"]
        _leave(Guard(child, Pipes._make([*reading, receipt]), link, page, quiet).watch())
    _redirect(stdout, stderr, crash, stacks)
    heartbeat.keep_workers_away()
    os.register_at_fork(after_in_child=lambda: _close(reports))
    _take_cores(place, os.environ.pop(protocol.BIND, "none"))
    report = _run(command)
    # The script has ended: a late request to stop must not turn its result into a failure.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    _deliver(report, reports, awaited)
    if report.get("resumable"):
        sys.exit(report["code"])  # the other ranks end by themselves at the same step
    if not report["done"]:
        _end_job(report["code"])


def _link(place: topology.Place | None) -> Link:
    """Connect to the launcher; if that fails, use the guard's own output."""
    rank = place.rank if place else 0
    size = place.size if place else 1
    sock = protocol.connect()
    records = protocol.ADDRESS in os.environ
    link = protocol.Connection(sock) if sock else Terminal(rank, size, records)
    hello = {"rank": rank, "host": socket.gethostname(), "token": os.environ.get(protocol.TOKEN, "")}
    link.send(protocol.HELLO, json.dumps(hello).encode())
    return link


def _leave(status: int) -> None:
    """End the guard in the same way as its rank, so that the MPI launcher sees the same exit status."""
    if status < 0:
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if -status not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(-status, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {-status})
        os.kill(os.getpid(), -status)
    os._exit(status if status >= 0 else 128 - status)


def _redirect(stdout: int, stderr: int, crash: int, stacks: int) -> None:
    """Make this forked process the rank: its output goes to the guard, and it is killed when the guard ends."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    os.dup2(stdout, 1)
    os.dup2(stderr, 2)
    os.close(stdout)
    os.close(stderr)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    faulthandler.enable(crash, all_threads=False)
    faulthandler.register(STACKS, stacks, all_threads=True)
    for name in (protocol.ADDRESS, protocol.TOKEN):
        os.environ.pop(name, None)


def _close(descriptor: int) -> None:
    with contextlib.suppress(OSError):
        os.close(descriptor)


def _take_cores(place: topology.Place | None, bind: str) -> None:
    """Bind this rank to its share of the host's cores, and let MPI yield if a rank has less than two of them."""
    if not place or place.local_rank is None or not place.local_size:
        return
    if cores.should_yield(place.local_size):
        for name, value in cores.YIELDING.items():
            os.environ.setdefault(name, value)
    mine = cores.of_rank(cores.physical(), place.local_rank, place.local_size, bind)
    if mine:
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, mine)


def _run(command: Sequence[str]) -> dict[str, Any]:
    """Run the script and return a report of its result."""
    # A batch script may send SIGUSR1 before the script has installed its own handler.
    signal.signal(signal.SIGUSR1, stop_request.note)
    with contextlib.suppress(OSError):  # a script that needs MPI gets its own error
        load_wheel()  # mpi4py may be imported before TensorFlow
    try:
        if command[0] == protocol.AS_HOROVOD:
            from hvdtrain import as_horovod

            as_horovod.install()
            command = command[1:]
        elif command[:2] != ["-m", "hvdtrain.wrap"]:
            _watch_stock_horovod(command)
        script.run(command)
    except SystemExit as stop:
        _await_cause(stop)
        return _stopped(stop)
    except BaseException as error:
        _await_cause(error)
        return _failed(error)
    return _finished()


def _watch_stock_horovod(command: Sequence[str]) -> None:
    """Stop the script at Horovod's `init` if Horovod would average nothing; only then its Keras is known."""

    def checked(init: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if _averages_nothing():
                version = sys.modules["keras"].__version__
                typed = settings.get(protocol.TYPED) or shlex.join(["hvdtrain", "run", "-np", "N", *command])
                raise StockHorovodExit(
                    f"stock Horovod averages no gradients under Keras {version}, so each rank would train a "
                    f"separate model; type: {typed.replace('hvdtrain run', 'hvdtrain run --as-horovod', 1)}"
                )
            return init(*args, **kwargs)

        return run

    def replace_init() -> None:
        replace(sys.modules["horovod.common.basics"].HorovodBasics, "init", checked)

    sys.meta_path.insert(0, AfterImport("horovod.common.basics", replace_init))


def _averages_nothing() -> bool:
    """Return whether the script uses Horovod for TensorFlow with Keras 3, other than as the engine of hvdtrain."""
    library = sys.modules.get("hvdtrain.collectives.horovod.library")
    if library is not None and library.serves_hvdtrain:
        return False
    keras = sys.modules.get("keras")
    keras3 = keras is not None and not getattr(keras, "__version__", "2").startswith("2.")
    # With tf_keras (TF_USE_LEGACY_KERAS=1 or imported by name) Horovod works.
    return keras3 and "horovod.tensorflow" in sys.modules and "tf_keras" not in sys.modules


def _finished() -> dict[str, Any]:
    """Return the report of a finished script, after the ranks have verified that their models are equal."""
    runtime = sys.modules.get("hvdtrain.runtime")
    threads = [thread for thread in threading.enumerate() if not thread.daemon]
    if runtime is None or len(threads) > 1:
        return SUCCESS  # the script may continue in another thread; the guard checks the exit code too
    try:
        runtime.finish()
    except Exception as error:
        _await_cause(error)
        return _failure(1, str(error), "")
    return SUCCESS


def _deliver(report: dict[str, Any], reports: int, awaited: int) -> None:
    """Send the report to the guard; wait until it has forwarded a failure, before MPI may kill the guard too."""
    _flush()
    with contextlib.suppress(OSError):
        os.write(reports, json.dumps(report).encode() + b"\n")
    if not report["done"]:
        select.select([awaited], [], [], 5)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()


def _stopped(stop: SystemExit) -> dict:
    """Return the report of a `sys.exit()`: success without a code or with 0, else a failure."""
    if isinstance(stop, StockHorovodExit):
        return _failure(1, str(stop.code), "")
    if isinstance(stop, stop_request.Preempted):
        return {**_failure(stop_request.RESUMABLE, stop.sentence, ""), "resumable": True}
    if stop.code is None or (isinstance(stop.code, int) and stop.code == 0):
        return _finished()
    if isinstance(stop.code, int):
        return _failure((stop.code & 0xFF) or 1, f"it called sys.exit({int(stop.code)}).", "")
    return _failure(1, f"it called sys.exit() with the message: {stop.code}", "")


def _failed(error: BaseException) -> dict:
    """Return the report of an exception, with the user's part of its traceback."""
    lines = traceback.format_exception(type(error), error, script.users_part(error))
    summary = traceback.format_exception_only(type(error), error)
    code = 128 + signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    return _failure(code, summary[-1].strip(), "".join([*lines, *_advice(error)]))


def _await_cause(error: BaseException) -> None:
    """Wait so that another rank reports first, if this error is only a consequence of that rank's failure."""
    runtime = sys.modules.get("hvdtrain.runtime")
    if runtime:
        _flush()
        runtime.await_cause(error)


def _advice(error: BaseException) -> list[str]:
    """Return lines to add to a traceback: hvdtrain's message if TensorFlow has wrapped it in another error.

    For a script written for Horovod, also what to write instead.
    """
    runtime, as_horovod = sys.modules.get("hvdtrain.runtime"), sys.modules.get("hvdtrain.as_horovod")
    messages = (runtime.last_words(error) if runtime else "", as_horovod.advice(error) if as_horovod else "")
    return [f"\n{message}\n" for message in messages if message]


def _failure(code: int, text: str, trace: str) -> dict:
    return {"done": False, "code": code, "text": text, "traceback": trace}


def _end_job(code: int) -> None:
    """End all ranks: with MPI_Abort if MPI is initialized, else with an exit code that the MPI launcher sees."""
    mpi = sys.modules.get("mpi4py.MPI")
    with contextlib.suppress(Exception):
        if mpi and mpi.Is_initialized() and not mpi.Is_finalized():
            mpi.COMM_WORLD.Abort(code)
    os._exit(code)


if __name__ == "__main__":
    main()
