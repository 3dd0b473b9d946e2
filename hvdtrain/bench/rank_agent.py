"""What `hvdtrain run` starts as each rank of a contender: it holds the worker still until it has the floor.

The driver is called over TCP. Its lines say what to do: `start` the worker, `go` with a request, `pause`, `end`.
When the driver is gone, so is the worker.
"""

import contextlib
import ctypes
import os
import re
import selectors
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from typing import IO, Any, final

from hvdtrain import safe_path, topology
from hvdtrain.bench.json_lines import Lines, packed
from hvdtrain.launch.start_plan import clean_environ
from hvdtrain.launch.supervision import protocol, rank_guard
from hvdtrain.launch.supervision.console import NOISE
from hvdtrain.launch.supervision.rank_main import PR_SET_PDEATHSIG

ADDRESS, TOKEN = "HVDTRAIN_BENCH_ADDRESS", "HVDTRAIN_BENCH_TOKEN"

GRACE = 10.0  # seconds for a worker to end by itself, MPI_Finalize included
CHUNK = 1 << 16
TAIL = 1 << 13  # bytes of a worker's last words

# What `hvdtrain run`, `hvdtrain tune` or the user sets to make MPI or Horovod faster than they come.
_TUNING = re.compile(
    r"OMPI_MCA_(mpi_yield_when_idle|coll_\w+|btl_(sm|vader|tcp)_\w+)|I_MPI_(THREAD_YIELD|ADJUST\w*|SHM_\w+)"
    r"|MPIR_CVAR_\w+|GLIBC_TUNABLES"
    r"|HOROVOD_(CYCLE_TIME|FUSION_THRESHOLD|CACHE_CAPACITY|AUTOTUNE\w*|HIERARCHICAL_\w+|THREAD_AFFINITY)"
)


def main() -> None:
    """Serves the driver to its end."""
    place = topology.detect()
    # The guard's own way of calling finds its launcher by this name.
    os.environ[protocol.ADDRESS] = os.environ.pop(ADDRESS)
    line = rank_guard.connect()
    if line is None:
        sys.exit(
            f"hvdtrain bench cannot be reached from {socket.gethostname()} at {os.environ[protocol.ADDRESS]}; "
            "expected that ranks can open TCP connections to the host that measures."
        )
    del os.environ[protocol.ADDRESS]
    hello = {
        "token": os.environ.pop(TOKEN),
        "rank": place.rank if place else 0,
        "size": place.size if place else 1,
        "host": socket.gethostname(),
        "port": _free_port(),
        "cpus": sorted(os.sched_getaffinity(0)),
    }
    line.sendall(packed(hello))
    Holder(line, place).serve()


def environ_for(order: Mapping[str, Any], place: topology.Place | None) -> dict[str, str]:
    """Makes the environment of a worker.

    Args:
        order: What the driver says of the contender: `environ`, `alone`, `stock`, and everybody's `addresses`.
        place: Where this rank stands.
    """
    environ = dict(os.environ)
    if order["stock"]:
        environ = {name: value for name, value in environ.items() if not _TUNING.fullmatch(name)}
    if order["alone"]:
        names = topology.launcher_variables()
        environ = {name: value for name, value in clean_environ(environ).items() if name not in names}
    elif place:
        host, _, port = order["addresses"][0].rpartition(":")
        environ |= {"MASTER_ADDR": host, "MASTER_PORT": port, "RANK": str(place.rank)}
        environ |= {"WORLD_SIZE": str(place.size), "LOCAL_RANK": str(place.local_rank or 0)}
        environ |= {"LOCAL_WORLD_SIZE": str(place.local_size or 1)}
    for name, value in order["environ"].items():
        environ.pop(name, None)
        if value is not None:
            environ[name] = value
    return environ


@final
class Holder:
    """Keeps one worker, which runs only while its contender has the floor.

    Args:
        line: The connection to the driver.
        place: Where this rank stands.
    """

    def __init__(self, line: socket.socket, place: topology.Place | None) -> None:
        self._line, self._place = line, place
        self._orders, self._answers = Lines(), Lines()
        self._said = b""
        self._worker: subprocess.Popen[bytes] | None = None
        self._over = False
        self._selector = selectors.DefaultSelector()
        self._selector.register(line, selectors.EVENT_READ, self._hear_driver)

    def serve(self) -> None:
        """Does what the driver says until it says `end`, or hangs up."""
        try:
            while not self._over:
                for key, _ in self._selector.select():
                    key.data()
        finally:
            self._kill()

    def _hear_driver(self) -> None:
        try:
            data = self._line.recv(CHUNK)
        except OSError:
            data = b""
        self._over = self._over or not data
        for message in self._orders.feed(data):
            getattr(self, f"_{message['do']}")(message)

    def _start(self, order: Mapping[str, Any]) -> None:
        self._worker = subprocess.Popen(
            [sys.executable, *safe_path.main_of("hvdtrain.bench.worker"), order["module"]],
            env=environ_for(order, self._place),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            close_fds=False,  # MPICH's ranks talk to their launcher through a file descriptor
            start_new_session=True,  # so that all it starts is stopped with it
            preexec_fn=_die_with_parent,
        )
        self._read(self._worker.stdout, self._hear_worker)
        self._read(self._worker.stderr, self._hear_stderr)
        place = (
            {"rank": self._place.rank, "size": self._place.size} if self._place else {"rank": 0, "size": 1}
        )
        self._send({**order["settings"], **place, "addresses": order["addresses"]})

    def _go(self, order: Mapping[str, Any]) -> None:
        self._signal(signal.SIGCONT)
        self._send(order["request"])

    def _pause(self, order: Mapping[str, Any]) -> None:
        assert self._worker
        self._signal(signal.SIGSTOP)
        # Nobody else starts before this one has really stopped; its end, if it ended, is still to be seen.
        os.waitid(os.P_PID, self._worker.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        self._line.sendall(packed({"paused": True}))

    def _end(self, order: Mapping[str, Any]) -> None:
        self._over = True
        self._signal(signal.SIGCONT)
        if self._worker:
            with contextlib.suppress(subprocess.TimeoutExpired, OSError, ValueError):
                self._worker.communicate(timeout=GRACE)

    def _hear_worker(self, data: bytes) -> None:
        if not data:
            self._fail()
        for message in self._answers.feed(data):
            self._line.sendall(packed(message))

    def _hear_stderr(self, data: bytes) -> None:
        self._said = (self._said + data)[-TAIL:]

    def _fail(self) -> None:
        """Tells the driver how the worker ended, with its last words."""
        assert self._worker and self._worker.stderr
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._worker.wait(GRACE)
        os.set_blocking(self._worker.stderr.fileno(), False)
        self._hear_stderr(self._worker.stderr.read() or b"")
        lines = [line for line in re.split(rb"[\r\n]+", self._said) if line.strip() and not NOISE.match(line)]
        words = [line.decode(errors="replace") for line in lines]
        self._line.sendall(packed({"failed": self._worker.returncode, "words": words}))

    def _send(self, message: Mapping[str, Any]) -> None:
        assert self._worker and self._worker.stdin
        with contextlib.suppress(BrokenPipeError):  # it has ended, and its end of the other pipe says so
            self._worker.stdin.write(packed(message))

    def _read(self, pipe: IO[bytes] | None, take: Any) -> None:
        assert pipe is not None

        def hear() -> None:
            data = os.read(pipe.fileno(), CHUNK)
            if not data:
                self._selector.unregister(pipe)
            take(data)

        self._selector.register(pipe, selectors.EVENT_READ, hear)

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            if self._worker:
                os.killpg(self._worker.pid, number)

    def _kill(self) -> None:
        self._signal(signal.SIGKILL)
        if self._worker:
            self._worker.wait()


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _free_port() -> int:
    with socket.create_server(("", 0)) as sock:
        return int(sock.getsockname()[1])


if __name__ == "__main__":
    main()
