"""Start the ranks of one contender with `hvdtrain run`, and exchange messages with the agent of each rank."""

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

from hvdtrain import safe_path
from hvdtrain.bench import rank_agent
from hvdtrain.bench.contender import Contender
from hvdtrain.bench.json_lines import pack_message
from hvdtrain.launch.supervision import protocol
from hvdtrain.launch.supervision.protocol import CLOSED, Server

_RUN = [sys.executable, *safe_path.main_of("hvdtrain.cli"), "run"]

START_SECONDS = 120.0  # for a job to start its ranks
LATE_SECONDS = 2.0  # for a failed rank to report its failure, after the connection of another rank was closed
END_SECONDS = 15.0  # for a job to end after its ranks were told to end


class FailedError(Exception):
    """A contender cannot continue; the message names the rank that failed and quotes its last output."""


@dataclass
class _Rank:
    """State of one rank.

    Args:
        info: The first message of its agent: host, port, CPUs.
        inbox: Messages that were received and not yet read.
        closed: Whether the connection to its agent is closed.
    """

    info: dict[str, Any]
    inbox: list[dict[str, Any]] = field(default_factory=list)
    closed: bool = False


@final
class ContenderJob:
    """Starts the job of a contender and communicates with all its ranks.

    Args:
        contender: The contender.
        ranks: Number of ranks.
        hosts: Hosts and their slots, as for `hvdtrain run -H`.
        bind: How ranks are bound to cores, as for `hvdtrain run --bind`.
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
        self.contender, self.ranks, self._limit = contender, ranks, limit
        self._hosts, self._remote = hosts, bool(addresses)
        self._selector = selectors.DefaultSelector()
        self._server = Server(self._selector, addresses)
        self._ranks: dict[int, _Rank] = {}
        self._output = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = self._launch(bind)

    @property
    def rank_infos(self) -> list[dict[str, Any]]:
        """The first message of each rank's agent: its host, the CPUs on which it may run."""
        return [rank.info for _, rank in sorted(self._ranks.items())]

    def start(self) -> None:
        """Start the workers, wait until they are ready, and stop them until they are asked.

        Raises:
            FailedError: If the job does not start, or a worker does not get ready.
        """
        self._await_ranks()
        contender = self.contender
        order: dict[str, Any] = {"module": contender.module, "settings": dict(contender.settings)}
        order |= {"environ": dict(contender.environ), "stock": contender.stock}
        order |= {"independent": contender.independent, "addresses": self._addresses()}
        self._server.send(pack_message({"do": "start", **order}))
        self._read_all("get ready")
        self._pause()

    def ask(self, request: dict[str, Any]) -> list[dict[str, Any]]:
        """Let the workers run for one request.

        Args:
            request: The request to each worker; it must be serializable as JSON.

        Returns:
            The answers by rank.

        Raises:
            FailedError: If a rank fails or does not answer in time.
        """
        self._server.send(pack_message({"do": "go", "request": request}))
        answers = self._read_all(f"answer {request}")
        self._pause()
        return answers

    def close(self, at_once: bool = False) -> None:
        """End the workers, the agents and the job.

        Args:
            at_once: Whether to kill the workers instead of letting them end by themselves.
        """
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
        """Tell the workers to end, without waiting for them; a connection closed without `end` means: at once."""
        if not at_once:
            self._server.send(pack_message({"do": "end"}))
        self._server.stop_sending()

    def _launch(self, bind: str) -> subprocess.Popen[bytes]:
        hosts = ["-H", self._hosts] if self._hosts else []
        script = str(Path(rank_agent.__file__))
        server = self._server.environ
        variables = {rank_agent.ADDRESS: server[protocol.ADDRESS], rank_agent.TOKEN: server[protocol.TOKEN]}
        variables["HVDTRAIN_STALL_SECONDS"] = "0"
        if "SLURM_JOB_ID" in os.environ:
            # The jobs of several contenders exist at the same time, but only one of them runs.
            variables["SLURM_OVERLAP"] = "1"
        return subprocess.Popen(
            [*_RUN, "-np", str(self.ranks), *hosts, "--bind", bind, script],
            env={**os.environ, **variables},
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=self._output,
            start_new_session=True,  # so that Ctrl-C reaches the ranks only through this process
        )

    def _await_ranks(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while len(self._ranks) < self.ranks:
            self._receive()
            if self._process.poll() is not None:
                raise FailedError(f"its ranks did not start: {self._last_output()}")
            if time.monotonic() > deadline:
                raise FailedError(
                    f"only {len(self._ranks)} of its {self.ranks} ranks were up after {START_SECONDS:g} s."
                )

    def _addresses(self) -> list[str]:
        """Return `host:port` of each rank, where it may open a server, with a name that the other ranks know."""
        infos = self.rank_infos
        if not self._remote and len({info["host"] for info in infos}) == 1:
            return [f"127.0.0.1:{info['port']}" for info in infos]
        names = [info["host"] for info in infos]
        if self._hosts:
            # Rank 0 is on the first of the hosts, whose name may be one that only the user knows.
            name, _, slots = self._hosts.partition(",")[0].rpartition(":")
            names[0] = name or slots or names[0]  # without a colon the name comes last
        return [f"{name}:{info['port']}" for name, info in zip(names, infos, strict=True)]

    def _pause(self) -> None:
        self._server.send(pack_message({"do": "pause"}))
        self._read_all("pause")

    def _read_all(self, action: str) -> list[dict[str, Any]]:
        """Wait for one message of each rank and return these messages by rank."""
        deadline = time.monotonic() + self._limit
        closed_at = None
        while not all(rank.inbox for rank in self._ranks.values()):
            self._receive()
            self._raise_if_failed()
            if closed_at is None and any(rank.closed for rank in self._ranks.values()):
                closed_at = time.monotonic()
            if closed_at is not None and time.monotonic() > closed_at + LATE_SECONDS:
                raise FailedError(f"its job ended: {self._last_output()}")
            if time.monotonic() > deadline:
                late = [str(number) for number, rank in sorted(self._ranks.items()) if not rank.inbox]
                raise FailedError(f"rank {', '.join(late)} did not {action} within {self._limit:g} s.")
        self._raise_if_failed()
        return [rank.inbox.pop(0) for _, rank in sorted(self._ranks.items())]

    def _raise_if_failed(self) -> None:
        for number, rank in sorted(self._ranks.items()):
            for message in rank.inbox:
                if "failed" in message:
                    how = _describe_exit(message["failed"])
                    raise FailedError(f"rank {number} {how}{_quote(message['output'])}")

    def _receive(self) -> None:
        """Store the messages that arrive within 0.2 s."""
        for key, _ in self._selector.select(timeout=0.2):
            for number, kind, payload in key.data():
                if kind == protocol.HELLO:
                    self._ranks[number] = _Rank(json.loads(payload))
                elif kind == CLOSED:
                    self._ranks[number].closed = True
                else:
                    self._ranks[number].inbox.append(json.loads(payload))

    def _last_output(self) -> str:
        self._output.seek(0)
        lines = self._output.read().decode(errors="replace").strip().splitlines()
        return "\n".join(lines[-10:]) or f"`hvdtrain run` ended with code {self._process.poll()}."


def _describe_exit(code: int) -> str:
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"was ended by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"


def _quote(lines: Sequence[str]) -> str:
    return ":\n" + "\n".join(f"    {line}" for line in lines[-12:]) if lines else "."
