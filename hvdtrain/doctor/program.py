"""Run other programs with a time limit, several at the same time, and end everything they started."""

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import IO, final

GRACE = 3  # seconds between SIGTERM and SIGKILL


@dataclass(frozen=True)
class Result:
    """The exit code of a program, None if it was still running at its time limit, and its output."""

    code: int | None
    out: str
    err: str
    seconds: float = 0  # the time limit

    @property
    def last_line(self) -> str:
        """The last line with a letter or a digit, where programs usually print the reason for a failure."""
        lines = [line.strip() for line in (self.out + self.err).splitlines()]
        return next((line for line in reversed(lines) if any(map(str.isalnum, line))), "")


@final
class Program:
    """A running program whose result is collected later, so that slow programs run at the same time.

    The program runs in its own process group, and all processes of the group are ended before the result is
    returned. A program that cannot be started has the exit code 127, as in a shell.

    Args:
        command: The program and its arguments.
        environ: Its environment variables.
        seconds: Its time limit, counted from now.
    """

    def __init__(self, command: Sequence[str], environ: Mapping[str, str], seconds: float):
        self._seconds, self._deadline = seconds, time.monotonic() + seconds
        # Files, not pipes: nobody reads while the program runs, and a full pipe would stop it.
        self._out, self._err = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115
        self._result: Result | None = None
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
            self._result = Result(127, "", str(error))

    def result(self) -> Result:
        """Wait for the program, at most until its time limit, and return its result, also in later calls."""
        if self._result is None and self._process:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(max(0.0, self._deadline - time.monotonic()))
            code = self._process.poll()
            self.close()
            self._result = Result(code, _read(self._out), _read(self._err), self._seconds)
        assert self._result
        return self._result

    def close(self) -> None:
        """End the program and all that it started; an MPI launcher gets a few seconds to end its ranks."""
        if self._result or not self._process:
            return
        _end(self._process, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(GRACE)
        _end(self._process, signal.SIGKILL)
        self._process.wait()


def run_program(command: Sequence[str], environ: Mapping[str, str], seconds: float) -> Result:
    """Run a program to its end, at most for `seconds`, and return its result."""
    program = Program(command, environ, seconds)
    try:
        return program.result()
    finally:
        program.close()


def _end(process: subprocess.Popen, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _read(file: IO[bytes]) -> str:
    with file:
        file.seek(0)
        return file.read().decode(errors="replace")
