"""What the MPI launcher starts as each rank: the user's script, watched over by a guard.

    mpirun -np 4 python -m hvdtrain.launch.supervision.rank_main train.py --epochs 3

Under `hvdtrain run` the guard relays output and failures to the launcher. Started by hand, under `srun`
in a batch script say, it writes the lines of every rank but the first with their `[rank]` before them,
and a failure in one rank still ends all.
"""

from hvdtrain import safe_path

safe_path.leave_working_directory()

import contextlib
import ctypes
import faulthandler
import json
import os
import select
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Sequence
from typing import Any

from hvdtrain import heartbeat, script, stop_request, topology
from hvdtrain.collectives.mpi import wheel as mpi_wheel
from hvdtrain.launch.launchers import binding
from hvdtrain.launch.supervision import protocol, stock_horovod
from hvdtrain.launch.supervision.rank_guard import Connection, Guard, Link, Pipes, Terminal, connect
from hvdtrain.launch.supervision.rank_monitor import STACKS

PR_SET_PDEATHSIG = 1
SUCCESS: dict[str, Any] = {"done": True, "code": 0, "text": "", "traceback": ""}


def main() -> None:
    """Run the script named on the command line as one rank, and ends as the script ends."""
    if len(sys.argv) < 2:
        sys.exit("Expected a script: python -m hvdtrain.launch.supervision.rank_main script.py [args]")
    words = protocol.unpack_words(sys.argv[1:])
    reading, (stdout, stderr, reports, crash, stacks) = zip(*(os.pipe() for _ in range(5)), strict=True)
    awaited, receipt = os.pipe()
    place = topology.detect()
    page = heartbeat.share()
    child = os.fork()
    for end in (stdout, stderr, reports, crash, stacks, awaited) if child else (*reading, receipt):
        os.close(end)
    if child:
        pipes = Pipes(reading[0], reading[1], reading[2], reading[3], reading[4], receipt)
        link = _link(place)
        if link.receiver() is not None:
            heartbeat.watch(page)
        # Of a script that knows nothing of ranks all is said once, by rank 0, also by TensorFlow's own code.
        quiet = bool(place and place.rank) and words[:2] == ["-m", "hvdtrain.wrap"]
        _leave(Guard(child, pipes, link, page, quiet).watch())
    _redirect(stdout, stderr, crash, stacks)
    heartbeat.keep_workers_away()
    os.register_at_fork(after_in_child=lambda: _close(reports))
    _take_cores(place, os.environ.pop(protocol.BIND, "none"))
    report = _run(words)
    # Whoever asks the training to stop is too late, and must not make a failure of its end.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    _deliver(report, reports, awaited)
    if report.get("resumable"):
        sys.exit(report["code"])  # the others end by themselves, in this same moment
    if not report["done"]:
        _end_job(report["code"])


def _link(place: topology.Place | None) -> Link:
    """Connect to the launcher; without one the guard's own output has to do."""
    rank = place.rank if place else 0
    sock = connect()
    size = place.size if place else 1
    link = Connection(sock) if sock else Terminal(rank, size, records=protocol.ADDRESS in os.environ)
    hello = {
        "rank": rank,
        "host": socket.gethostname(),
        "token": os.environ.get(protocol.TOKEN, ""),
    }
    link.send(protocol.HELLO, json.dumps(hello).encode())
    return link


def _leave(status: int) -> None:
    """End the guard as its rank ended, so that the MPI launcher sees the same."""
    if status < 0:
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.signal(-status, signal.SIG_DFL) if -status not in (signal.SIGKILL, signal.SIGSTOP) else None
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {-status})
        os.kill(os.getpid(), -status)
    os._exit(status if status >= 0 else 128 - status)


def _redirect(stdout: int, stderr: int, crash: int, stacks: int) -> None:
    """Turn the forked child into the rank: its output goes to the guard, and it ends when the guard does."""
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
    """Bind this rank to its share of the host's cores, and lets MPI yield where that is less than two."""
    if not place or place.local_rank is None or not place.local_size:
        return
    if binding.should_yield(len(os.sched_getaffinity(0)), place.local_size):
        for name, value in binding.YIELDING.items():
            os.environ.setdefault(name, value)
    mine = binding.share(binding.cores(), place.local_rank, place.local_size, bind)
    if mine:
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, mine)


def _run(words: Sequence[str]) -> dict[str, Any]:
    """Run the script and reports how it ended."""
    # A batch script may ask before the script has come to where it listens.
    signal.signal(signal.SIGUSR1, stop_request.note)
    with contextlib.suppress(OSError):  # a script that needs MPI will be told
        mpi_wheel.prepare()  # mpi4py may be imported before TensorFlow
    try:
        if words[0] == protocol.AS_HOROVOD:
            from hvdtrain import as_horovod

            as_horovod.install()
            words = words[1:]
        elif words[:2] != ["-m", "hvdtrain.wrap"]:
            stock_horovod.watch(words)
        script.run(words)
    except SystemExit as stop:
        _await_cause(stop)
        return _stopped(stop)
    except BaseException as error:
        _await_cause(error)
        return _failed(error)
    return _finished()


def _finished() -> dict[str, Any]:
    """Report a script that came to its end, once it is known that the ranks have come there as one model."""
    runtime = sys.modules.get("hvdtrain.runtime")
    others = [each for each in threading.enumerate() if not each.daemon]
    if runtime is None or len(others) > 1:
        return SUCCESS  # the script may go on in another thread; the end of the process is looked at as well
    try:
        runtime.finish()
    except Exception as error:
        _await_cause(error)
        return _failure(1, str(error), "")
    return SUCCESS


def _deliver(report: dict[str, Any], reports: int, awaited: int) -> None:
    """Hand the report to the guard; a failure's must be on its way before MPI may kill the guard too."""
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
    """Report a `sys.exit()`, which means success without a code and a sentence with a text."""
    if isinstance(stop, stock_horovod.StockHorovodExit):
        return _failure(1, str(stop.code), "")
    if isinstance(stop, stop_request.Preempted):
        return {**_failure(stop_request.RESUMABLE, stop.sentence, ""), "resumable": True}
    if stop.code is None or (isinstance(stop.code, int) and stop.code == 0):
        return _finished()
    if isinstance(stop.code, int):
        return _failure((stop.code & 0xFF) or 1, f"it called sys.exit({int(stop.code)}).", "")
    return _failure(1, f"it called sys.exit() with the words: {stop.code}", "")


def _failed(error: BaseException) -> dict:
    """Report an exception with the part of its traceback that is the user's."""
    lines = traceback.format_exception(type(error), error, script.users_part(error))
    words = traceback.format_exception_only(type(error), error)
    code = 128 + signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    return _failure(code, words[-1].strip(), "".join([*lines, *_buried(error)]))


def _await_cause(error: BaseException) -> None:
    """Leaves the last word to another rank, where this one has only learned of its failure."""
    runtime = sys.modules.get("hvdtrain.runtime")
    if runtime:
        _flush()
        runtime.await_cause(error)


def _buried(error: BaseException) -> list[str]:
    """Repeats hvdtrain's own sentence where TensorFlow has put it deep inside an error of another kind.

    To an old script's error it adds what to write instead.
    """
    runtime, as_horovod = sys.modules.get("hvdtrain.runtime"), sys.modules.get("hvdtrain.as_horovod")
    sentences = (
        runtime.last_words(error) if runtime else "",
        as_horovod.advice(error) if as_horovod else "",
    )
    return [f"\n{sentence}\n" for sentence in sentences if sentence]


def _failure(code: int, text: str, trace: str) -> dict:
    return {"done": False, "code": code, "text": text, "traceback": trace}


def _end_job(code: int) -> None:
    """End every rank: through MPI where it is up, else through the exit code that the MPI launcher sees."""
    mpi = sys.modules.get("mpi4py.MPI")
    with contextlib.suppress(Exception):
        if mpi and mpi.Is_initialized() and not mpi.Is_finalized():
            mpi.COMM_WORLD.Abort(code)
    os._exit(code)


if __name__ == "__main__":
    main()
