"""The ranks of one contender: a job of `hvdtrain run`, and a line to the holder of each rank."""

import contextlib
import hmac
import os
import secrets
import selectors
import signal
import socket
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
from hvdtrain.bench.json_lines import Lines, packed
from hvdtrain.launch.supervision.rank_guard import keep_alive

_RUN = [sys.executable, *safe_path.main_of("hvdtrain.cli"), "run"]

UP = 120.0  # seconds for a job to start its ranks
LATE = 2.0  # seconds for a rank that failed to say so, once another rank's line is cut
ENDING = 15.0  # seconds for a job to end once its ranks have been told to


class FailedError(Exception):
    """A contender cannot go on; the message says which rank failed, and with what words."""


@dataclass
class _Rank:
    """One holder: its line, what it said of itself, and what has come from it and was not yet taken."""

    socket: socket.socket
    lines: Lines = field(default_factory=Lines)
    hello: dict[str, Any] = field(default_factory=dict)
    inbox: list[dict[str, Any]] = field(default_factory=list)
    cut: bool = False


@final
class Crew:
    """Starts a contender's job and speaks for all its ranks.

    Args:
        contender: Whose ranks they are.
        ranks: How many.
        hosts: Hosts and their slots, as `hvdtrain run -H` takes them.
        bind: How ranks are bound to cores, as `hvdtrain run --bind` takes it.
        addresses: Names of this host for ranks on other hosts; empty when all are here.
        limit: How many seconds the worker may take to get ready, or to answer.
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
        self._listener = socket.create_server(("" if addresses else "127.0.0.1", 0), backlog=1024)
        self._token = secrets.token_hex(16)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        self._callers: list[_Rank] = []
        self._line: dict[int, _Rank] = {}
        self._said = tempfile.TemporaryFile()  # noqa: SIM115
        port = self._listener.getsockname()[1]
        calls = ",".join(f"{name}:{port}" for name in addresses or ["127.0.0.1"])
        self._process = self._launch(calls, bind)

    @property
    def hellos(self) -> list[dict[str, Any]]:
        """What each rank has said of itself: its host, the CPUs on which it may run."""
        return [rank.hello for _, rank in sorted(self._line.items())]

    def start(self) -> None:
        """Lets the workers get ready, and stops them again.

        Raises:
            FailedError: If the job does not start, or a worker does not get ready.
        """
        self._gather_ranks()
        contender = self.contender
        order = {"module": contender.module, "settings": dict(contender.settings), "alone": contender.alone}
        order |= {"environ": dict(contender.environ), "stock": contender.stock}
        self._tell({"do": "start", **order, "addresses": self._addresses()})
        self._hear("get ready")
        self._pause()

    def ask(self, request: dict[str, Any]) -> list[dict[str, Any]]:
        """Gives the workers the floor for one request.

        Args:
            request: What they are asked; JSON carries it.

        Returns:
            The answers by rank.

        Raises:
            FailedError: If a rank fails or does not answer in time.
        """
        self._tell({"do": "go", "request": request})
        answers = self._hear(f"answer {request}")
        self._pause()
        return answers

    def close(self, at_once: bool = False) -> None:
        """Ends workers, holders and the job.

        Args:
            at_once: Whether to do so without the workers' help.
        """
        self.leave(at_once)
        for rank in self._callers:
            rank.socket.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(ENDING if not at_once else LATE)
        for number in (signal.SIGTERM, signal.SIGKILL):
            if self._process.poll() is None:
                with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                    os.killpg(self._process.pid, number)
                    self._process.wait(ENDING)
        self._selector.close()
        self._listener.close()
        self._said.close()

    def leave(self, at_once: bool = False) -> None:
        """Tells the workers to end, without waiting for it; a line that is cut means: at once."""
        for rank in self._callers:
            with contextlib.suppress(OSError):
                if not at_once:
                    rank.socket.sendall(packed({"do": "end"}))
                rank.socket.shutdown(socket.SHUT_WR)

    def _launch(self, calls: str, bind: str) -> subprocess.Popen[bytes]:
        hosts = ["-H", self._hosts] if self._hosts else []
        script = str(Path(rank_agent.__file__))
        told = {rank_agent.ADDRESS: calls, rank_agent.TOKEN: self._token, "HVDTRAIN_STALL_SECONDS": "0"}
        # Jobs of several contenders are there at a time, and only one of them works.
        told |= {"SLURM_OVERLAP": "1"} if "SLURM_JOB_ID" in os.environ else {}
        return subprocess.Popen(
            [*_RUN, "-np", str(self.ranks), *hosts, "--bind", bind, script],
            env={**os.environ, **told},
            stdin=subprocess.DEVNULL,
            stdout=self._said,
            stderr=self._said,
            start_new_session=True,  # so that Ctrl-C reaches the ranks only through here
        )

    def _gather_ranks(self) -> None:
        deadline = time.monotonic() + UP
        while len(self._line) < self.ranks:
            self._turn()
            if self._process.poll() is not None:
                raise FailedError(f"its ranks did not start: {self._last_words()}")
            if time.monotonic() > deadline:
                raise FailedError(f"only {len(self._line)} of its {self.ranks} ranks were up after {UP:g} s.")

    def _addresses(self) -> list[str]:
        """Writes where each rank may open a server, under a name by which the other ranks find it."""
        several = len({hello["host"] for hello in self.hellos}) > 1 or self._remote
        first = self._hosts.partition(",")[0].rpartition(":") if self._hosts else ("", "", "")
        named = [hello["host"] if several else "127.0.0.1" for hello in self.hellos]
        named[0] = (first[0] or first[2] or named[0]) if several else named[0]
        return [f"{name}:{hello['port']}" for name, hello in zip(named, self.hellos, strict=True)]

    def _tell(self, message: dict[str, Any]) -> None:
        for rank in self._line.values():
            with contextlib.suppress(OSError):  # that line is cut, as will be seen
                rank.socket.sendall(packed(message))

    def _pause(self) -> None:
        self._tell({"do": "pause"})
        self._hear("pause")

    def _hear(self, what: str) -> list[dict[str, Any]]:
        """Waits until each rank has said one thing."""
        deadline = time.monotonic() + self._limit
        cut_at = None
        while not all(rank.inbox for rank in self._line.values()):
            self._turn()
            self._raise_if_failed()
            if cut_at is None and any(rank.cut for rank in self._line.values()):
                cut_at = time.monotonic()
            if cut_at is not None and time.monotonic() > cut_at + LATE:
                raise FailedError(f"its job ended: {self._last_words()}")
            if time.monotonic() > deadline:
                late = [str(number) for number, rank in sorted(self._line.items()) if not rank.inbox]
                raise FailedError(f"rank {', '.join(late)} did not {what} within {self._limit:g} s.")
        self._raise_if_failed()
        return [rank.inbox.pop(0) for _, rank in sorted(self._line.items())]

    def _raise_if_failed(self) -> None:
        for number, rank in sorted(self._line.items()):
            for message in rank.inbox:
                if "failed" in message:
                    raise FailedError(f"rank {number} {_how(message['failed'])}{_quoted(message['words'])}")

    def _turn(self) -> None:
        for key, _ in self._selector.select(timeout=0.2):
            key.data()

    def _accept(self) -> None:
        sock, _ = self._listener.accept()
        keep_alive(sock)
        rank = _Rank(sock)
        self._callers.append(rank)
        self._selector.register(sock, selectors.EVENT_READ, lambda: self._take(rank))

    def _take(self, rank: _Rank) -> None:
        try:
            data = rank.socket.recv(1 << 18)
        except OSError:
            data = b""
        if not data:
            rank.cut = True
            self._selector.unregister(rank.socket)
            return
        try:
            messages = rank.lines.feed(data)
            if not rank.hello and messages:
                self._admit(rank, messages.pop(0))
        except (ValueError, KeyError, TypeError, AttributeError):
            self._selector.unregister(rank.socket)
            return
        rank.inbox.extend(messages)

    def _admit(self, rank: _Rank, hello: dict[str, Any]) -> None:
        if not hmac.compare_digest(hello["token"], self._token):
            raise ValueError("a stranger")
        rank.hello = hello
        self._line[int(hello["rank"])] = rank

    def _last_words(self) -> str:
        self._said.seek(0)
        lines = self._said.read().decode(errors="replace").strip().splitlines()
        return "\n".join(lines[-10:]) or f"`hvdtrain run` ended with code {self._process.poll()}."


def _how(code: int) -> str:
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"was ended by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"


def _quoted(words: Sequence[str]) -> str:
    return ":\n" + "\n".join(f"    {line}" for line in words[-12:]) if words else "."
