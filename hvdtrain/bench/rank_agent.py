"""Run the worker of one rank only when its contender is asked; `hvdtrain run` starts this script on each rank.

It connects to the benchmark's process over TCP and executes its orders, which are frames as between a guard and the
launcher: START the worker, GO with a request, PAUSE, END. When the benchmark's process ends, the worker is killed.
"""

import contextlib
import ctypes
import json
import os
import re
import selectors
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from functools import partial
from typing import IO, Any, final

from hvdtrain import safe_path, topology
from hvdtrain.launch.start_plan import clean_environ
from hvdtrain.launch.supervision import protocol
from hvdtrain.launch.supervision.console import NOISE
from hvdtrain.launch.supervision.rank_main import PR_SET_PDEATHSIG

ADDRESS, TOKEN = "HVDTRAIN_BENCH_ADDRESS", "HVDTRAIN_BENCH_TOKEN"
START, GO, PAUSE, END = b"S", b"G", b"P", b"E"

END_SECONDS = 10.0  # for a worker to end by itself, MPI_Finalize included
CHUNK = 1 << 16
KEPT = 1 << 13  # bytes of a worker's last output

# Variables by which `hvdtrain run`, `hvdtrain tune` or the user makes MPI or Horovod faster than by default.
_TUNING = re.compile(
    r"OMPI_MCA_(mpi_yield_when_idle|coll_\w+|btl_(sm|vader|tcp)_\w+)|I_MPI_(THREAD_YIELD|ADJUST\w*|SHM_\w+)"
    r"|MPIR_CVAR_\w+|GLIBC_TUNABLES"
    r"|HOROVOD_(CYCLE_TIME|FUSION_THRESHOLD|CACHE_CAPACITY|AUTOTUNE\w*|HIERARCHICAL_\w+|THREAD_AFFINITY)"
)


def main() -> None:
    """Connect to the benchmark's process and obey it until it ends."""
    place = topology.detect()
    # `protocol.connect` reads the address from the launcher's variable.
    os.environ[protocol.ADDRESS] = os.environ.pop(ADDRESS)
    sock = protocol.connect()
    if sock is None:
        sys.exit(
            f"hvdtrain bench cannot be reached from {socket.gethostname()} at {os.environ[protocol.ADDRESS]}; "
            "expected that ranks can open TCP connections to the host that measures."
        )
    del os.environ[protocol.ADDRESS]
    info = {
        "token": os.environ.pop(TOKEN),
        "rank": place.rank if place else 0,
        "host": socket.gethostname(),
        "port": _free_port(),
        "cpus": sorted(os.sched_getaffinity(0)),
    }
    protocol.Connection(sock).send(protocol.HELLO, json.dumps(info).encode())
    RankAgent(sock, place).serve()


@final
class RankAgent:
    """Controls one worker over the connection `sock` to the benchmark's process."""

    def __init__(self, sock: socket.socket, place: topology.Place | None) -> None:
        self._socket, self._link, self._place = sock, protocol.Connection(sock), place
        self._frames = protocol.Frames()
        self._worker: subprocess.Popen[bytes] | None = None
        self._stderr = b""
        self._done = False
        self._selector = selectors.DefaultSelector()
        self._selector.register(sock, selectors.EVENT_READ, self._read_orders)

    def serve(self) -> None:
        """Obey the benchmark's process until it sends END or closes the connection."""
        try:
            while not self._done:
                for key, _ in self._selector.select():
                    key.data()
        finally:
            self._signal(signal.SIGKILL)
            if self._worker:
                self._worker.wait()

    def _read_orders(self) -> None:
        try:
            data = self._socket.recv(CHUNK)
        except OSError:
            data = b""
        self._done = self._done or not data
        for kind, payload in self._frames.feed(data):
            content = json.loads(payload)
            if kind == START:
                self._start(content)
            elif kind == GO:
                self._signal(signal.SIGCONT)
                self._send(content)
            elif kind == PAUSE:
                self._pause()
            else:
                self._end()

    def _start(self, order: Mapping[str, Any]) -> None:
        worker = subprocess.Popen(
            [sys.executable, *safe_path.main_of("hvdtrain.bench.worker"), order["work"]],
            env=_environ(order, self._place),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            close_fds=False,  # MPICH's ranks communicate with their launcher through a file descriptor
            start_new_session=True,  # so that all processes that it starts are stopped with it
            preexec_fn=_die_with_parent,
        )
        self._worker = worker
        assert worker.stdout and worker.stderr
        self._selector.register(
            worker.stdout, selectors.EVENT_READ, partial(self._read_answer, worker.stdout)
        )
        self._selector.register(
            worker.stderr, selectors.EVENT_READ, partial(self._read_stderr, worker.stderr)
        )
        rank, size = (self._place.rank, self._place.size) if self._place else (0, 1)
        self._send({**order["settings"], "rank": rank, "size": size, "addresses": order["addresses"]})

    def _pause(self) -> None:
        assert self._worker
        self._signal(signal.SIGSTOP)
        # No other contender starts before this worker has really stopped. WNOWAIT: if it has ended instead, `_fail`
        # still needs its exit status.
        os.waitid(os.P_PID, self._worker.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        self._report({"paused": True})

    def _end(self) -> None:
        self._done = True
        self._signal(signal.SIGCONT)
        if self._worker:
            with contextlib.suppress(subprocess.TimeoutExpired, OSError, ValueError):
                self._worker.communicate(timeout=END_SECONDS)

    def _read_answer(self, stdout: IO[bytes]) -> None:
        line = stdout.readline()
        if line.endswith(b"\n"):
            self._report(json.loads(line))  # a line that is no answer ends this agent only
        else:
            self._selector.unregister(stdout)
            self._fail()

    def _read_stderr(self, stderr: IO[bytes]) -> None:
        data = os.read(stderr.fileno(), CHUNK)
        if not data:
            self._selector.unregister(stderr)
        self._stderr = (self._stderr + data)[-KEPT:]

    def _fail(self) -> None:
        """Report the exit code of the worker and the last lines that it wrote."""
        assert self._worker and self._worker.stderr
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._worker.wait(END_SECONDS)
        os.set_blocking(self._worker.stderr.fileno(), False)
        written = (self._stderr + (self._worker.stderr.read() or b""))[-KEPT:]
        lines = []
        for line in re.split(rb"[\r\n]+", written):
            if line.strip() and not NOISE.match(line):
                lines.append(line.decode(errors="replace"))
        self._report({"failed": self._worker.returncode, "output": lines})

    def _report(self, message: Mapping[str, Any]) -> None:
        self._link.send(protocol.REPORT, json.dumps(message).encode())

    def _send(self, message: Mapping[str, Any]) -> None:
        assert self._worker and self._worker.stdin
        # A worker that has ended is noticed at its standard output.
        with contextlib.suppress(BrokenPipeError):
            self._worker.stdin.write(json.dumps(message).encode() + b"\n")

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            if self._worker:
                os.killpg(self._worker.pid, number)


def _environ(order: Mapping[str, Any], place: topology.Place | None) -> dict[str, str]:
    """Return the environment of a worker for the content of START: a contender, and `addresses` of all ranks."""
    environ = dict(os.environ)
    if order["stock"]:
        environ = {name: value for name, value in environ.items() if not _TUNING.fullmatch(name)}
    if order["independent"]:
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


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _free_port() -> int:
    with socket.create_server(("", 0)) as sock:
        return int(sock.getsockname()[1])


if __name__ == "__main__":
    main()
