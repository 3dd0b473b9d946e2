"""Describe a contender, start its ranks with `hvdtrain run`, and exchange messages with the agent of each rank."""

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, final

from hvdtrain import safe_path
from hvdtrain.bench import rank_agent
from hvdtrain.launch.supervision import protocol
from hvdtrain.launch.supervision.protocol import CLOSED, Server

START_SECONDS = 120.0  # for a job to start its ranks
LATE_SECONDS = 2.0  # for a failed rank to report its failure, after the connection of another rank was closed
END_SECONDS = 15.0  # for a job to end after its ranks were told to end

# The command that installs a module; modules that are not listed are installed with the peers.
_INSTALL = {
    "horovod": "hvdtrain build-horovod",
    "tensorflow": "pip install 'tensorflow-cpu>=2.16'",
    "keras": "pip install 'keras>=3.5'",
}
_PEERS = "pip install 'hvdtrain[peers]'"


class FailedError(Exception):
    """A contender cannot continue; the message names the rank that failed and quotes its last output."""


@dataclass(frozen=True)
class Contender:
    """One way of doing the work, executed by its own ranks."""

    name: str  # in tables; unique within its scheduler
    # "module:function"; each worker calls it with the settings, and it returns a function that answers requests
    work: str
    # what JSON can hold; the agent adds `rank`, `size` and `addresses`, one free `host:port` for each rank
    settings: Mapping[str, Any] = field(default_factory=dict)
    environ: Mapping[str, str | None] = field(default_factory=dict)  # of its workers; None removes a variable
    needs: tuple[str, ...] = ()  # modules that must be installed; otherwise the contender is left out
    independent: bool = (
        False  # its workers are independent processes, without the variables of an MPI launcher
    )
    stock: bool = (
        False  # without the settings that make MPI and Horovod faster, from `hvdtrain run` or the user
    )
    ranks: int | None = None  # None for the number of the scheduler

    def missing(self) -> str:
        """Return which modules are not installed and what to type; an empty string if all are installed."""
        absent = [name for name in self.needs if find_spec(name) is None]
        if not absent:
            return ""
        commands = dict.fromkeys(_INSTALL.get(name, _PEERS) for name in absent)
        return f"{' and '.join(absent)} not installed; type {' and '.join(commands)}"


@final
class ContenderJob:
    """Starts the job of a contender and communicates with all its ranks.

    Args:
        contender: The contender.
        ranks: Number of ranks.
        hosts: The hosts of `hvdtrain run -H`.
        bind: The value of `hvdtrain run --bind`.
        addresses: Names of this host for ranks on other hosts; empty when all ranks are on this host.
        limit: Seconds that a worker may take to get ready, or to answer.
    """

    def __init__(
        self,
        contender: Contender,
        ranks: int,
        hosts: str | None,
        bind: str,
        addresses: Sequence[str],
        limit: float,
    ) -> None:
        self._contender, self._ranks, self._limit = contender, ranks, limit
        self._hosts, self._remote = hosts, bool(addresses)
        self._selector = selectors.DefaultSelector()
        self._server = Server(self._selector, addresses)
        self._infos: dict[int, dict[str, Any]] = {}  # the first message of each rank's agent
        self._inboxes: dict[int, list[dict[str, Any]]] = {}  # messages of each rank that were not yet read
        self._closed_at: float | None = None  # when the first connection was closed
        self._output = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = self._launch(bind)

    @property
    def rank_infos(self) -> list[dict[str, Any]]:
        """The host of each rank, and the CPUs on which it may run."""
        return [info for _, info in sorted(self._infos.items())]

    def start(self) -> None:
        """Start the workers, wait until they are ready, and stop them until they are asked; raise FailedError."""
        self._await_ranks()
        self._order(rank_agent.START, {**asdict(self._contender), "addresses": self._addresses()})
        self._read_all("get ready")
        self._pause()

    def ask(self, request: dict[str, Any]) -> list[dict[str, Any]]:
        """Let the workers run for one request, and return the answers by rank; raise FailedError without them."""
        self._order(rank_agent.GO, request)
        answers = self._read_all(f"answer {request}")
        self._pause()
        return answers

    def close(self, at_once: bool = False) -> None:
        """End the workers, the agents and the job; `at_once` kills the workers."""
        self.request_end(at_once)
        self._server.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(END_SECONDS if not at_once else LATE_SECONDS)
        for number in (signal.SIGTERM, signal.SIGKILL):
            if self._process.poll() is None:
                with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                    os.killpg(self._process.pid, number)
                    self._process.wait(END_SECONDS)
        self._selector.close()
        self._output.close()

    def request_end(self, at_once: bool = False) -> None:
        """Tell the workers to end, without waiting for them; a connection closed without END means: at once."""
        if not at_once:
            self._order(rank_agent.END)
        self._server.stop_sending()

    def _launch(self, bind: str) -> subprocess.Popen[bytes]:
        hosts = ["-H", self._hosts] if self._hosts else []
        server = self._server.environ
        variables = {rank_agent.ADDRESS: server[protocol.ADDRESS], rank_agent.TOKEN: server[protocol.TOKEN]}
        variables["HVDTRAIN_STALL_SECONDS"] = "0"
        if "SLURM_JOB_ID" in os.environ:
            # The jobs of several contenders exist at the same time, but only one of them runs.
            variables["SLURM_OVERLAP"] = "1"
        command = [sys.executable, *safe_path.main_of("hvdtrain.cli"), "run", "-np", str(self._ranks)]
        return subprocess.Popen(
            [*command, *hosts, "--bind", bind, str(Path(rank_agent.__file__))],
            env={**os.environ, **variables},
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=self._output,
            start_new_session=True,  # so that Ctrl-C reaches the ranks only through this process
        )

    def _await_ranks(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while len(self._infos) < self._ranks:
            self._receive()
            if self._process.poll() is not None:
                raise FailedError(f"its ranks did not start: {self._last_output()}")
            if time.monotonic() > deadline:
                raise FailedError(
                    f"only {len(self._infos)} of its {self._ranks} ranks were up after {START_SECONDS:g} s."
                )

    def _addresses(self) -> list[str]:
        """Return `host:port` of each rank, where it may open a server, with names that the other ranks know."""
        names = [info["host"] for info in self.rank_infos]
        if not self._remote and len(set(names)) == 1:
            names = ["127.0.0.1"] * len(names)
        elif self._hosts:
            # Rank 0 is on the first of the hosts, whose name may be one that only the user knows.
            name, _, slots = self._hosts.partition(",")[0].rpartition(":")
            names[0] = name or slots or names[0]  # without a colon the name comes last
        return [f"{name}:{info['port']}" for name, info in zip(names, self.rank_infos, strict=True)]

    def _order(self, kind: bytes, content: Mapping[str, Any] | None = None) -> None:
        self._server.send(protocol.pack(kind, json.dumps(content).encode()))

    def _pause(self) -> None:
        self._order(rank_agent.PAUSE)
        self._read_all("pause")

    def _read_all(self, action: str) -> list[dict[str, Any]]:
        """Wait for one message of each rank and return these messages by rank."""
        deadline = time.monotonic() + self._limit
        while not all(self._inboxes.values()):
            self._receive()
            self._raise_if_failed()
            if self._closed_at is not None and time.monotonic() > self._closed_at + LATE_SECONDS:
                raise FailedError(f"its job ended: {self._last_output()}")
            if time.monotonic() > deadline:
                late = [str(rank) for rank, inbox in sorted(self._inboxes.items()) if not inbox]
                raise FailedError(f"rank {', '.join(late)} did not {action} within {self._limit:g} s.")
        self._raise_if_failed()
        return [inbox.pop(0) for _, inbox in sorted(self._inboxes.items())]

    def _raise_if_failed(self) -> None:
        for rank, inbox in sorted(self._inboxes.items()):
            for message in inbox:
                if "failed" in message:
                    quoted = "".join(f"\n    {line}" for line in message["output"][-12:])
                    how = _describe_exit(message["failed"])
                    raise FailedError(f"rank {rank} {how}{':' if quoted else '.'}{quoted}")

    def _receive(self) -> None:
        """Store the messages that arrive within 0.2 s."""
        for key, _ in self._selector.select(timeout=0.2):
            for rank, kind, payload in key.data():
                if kind == protocol.HELLO:
                    self._infos[rank], self._inboxes[rank] = json.loads(payload), []
                elif kind == CLOSED:
                    self._closed_at = self._closed_at or time.monotonic()
                else:
                    self._inboxes[rank].append(json.loads(payload))

    def _last_output(self) -> str:
        self._output.seek(0)
        lines = self._output.read().decode(errors="replace").strip().splitlines()
        return "\n".join(lines[-10:]) or f"`hvdtrain run` ended with code {self._process.poll()}."


def _describe_exit(code: int) -> str:
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"was ended by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"
