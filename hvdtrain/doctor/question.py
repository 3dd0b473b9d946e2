"""A question put to another program, which may be absent, fail, talk nonsense or never answer."""

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import IO, final

GRACE = 3  # seconds between asking a program to end and ending it


@dataclass(frozen=True)
class Answer:
    """What a program said.

    Args:
        code: Its exit code; None when it was still running when its `seconds` were over.
        out: Its standard output.
        err: Its standard error.
        seconds: How long it was given.
    """

    code: int | None
    out: str
    err: str
    seconds: float = 0

    @property
    def last_line(self) -> str:
        """The last line that says anything, where programs put the reason for a failure."""
        lines = [line.strip() for line in (self.out + self.err).splitlines()]
        return next((line for line in reversed(lines) if any(map(str.isalnum, line))), "")


@final
class Question:
    """Asks at once and lets the caller collect the answer later, so that slow questions overlap.

    The program gets a process group of its own, and nothing of that group outlives the answer. One that
    cannot be started answers with code 127, as in a shell.

    Args:
        command: The program and its arguments.
        environ: The environment it sees.
        seconds: How long it may take, from now.
    """

    def __init__(self, command: Sequence[str], environ: Mapping[str, str], seconds: float):
        self._seconds, self._deadline = seconds, time.monotonic() + seconds
        # Files, not pipes: nobody reads while the program runs, and a full pipe would stop it.
        self._out, self._err = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115
        self._answer: Answer | None = None
        self._process: subprocess.Popen | None = None
        try:
            self._process = subprocess.Popen(
                command,
                env=dict(environ),
                stdin=subprocess.DEVNULL,
                stdout=self._out,
                stderr=self._err,
                start_new_session=True,
            )
        except OSError as error:
            self._answer = Answer(127, "", str(error))

    def answer(self) -> Answer:
        """Waits for the program, at most until its deadline; asked again, it gives the same answer."""
        if self._answer is None and self._process:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(max(0.0, self._deadline - time.monotonic()))
            code = self._process.poll()
            self.close()
            self._answer = Answer(code, _read(self._out), _read(self._err), self._seconds)
        assert self._answer
        return self._answer

    def close(self) -> None:
        """Ends the program and all that it started; an MPI launcher is given a moment to end its ranks."""
        if self._answer or not self._process:
            return
        _end(self._process, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(GRACE)
        _end(self._process, signal.SIGKILL)
        self._process.wait()


def ask(command: Sequence[str], environ: Mapping[str, str], seconds: float) -> Answer:
    """Asks and waits, for a program that answers quickly."""
    question = Question(command, environ, seconds)
    try:
        return question.answer()
    finally:
        question.close()


def _end(process: subprocess.Popen, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _read(file: IO[bytes]) -> str:
    with file:
        file.seek(0)
        return file.read().decode(errors="replace")
