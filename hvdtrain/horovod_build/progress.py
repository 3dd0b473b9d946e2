"""Run the commands of a build, show their progress, and write their output to a log."""

import contextlib
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)

from hvdtrain.horovod_build.target import CannotBuild

_PERCENT = re.compile(r"^\s*\[\s*(\d+)%\]")
_ERROR = re.compile(r"error:|CMake Error|undefined reference|No space left|Killed", re.IGNORECASE)
_STEP = 20  # percent between two lines of progress


class Steps:
    """Run the commands of a build with one log for all; no process of a command outlives it.

    The console shows each phase and its time: a bar in a terminal, else a line for every 20 %; with `verbose` also
    the output of the commands.
    """

    def __init__(self, log: Path, console: Console, verbose: bool = False):
        self.log = log
        self._console = console
        self._verbose = verbose
        self._phase = ""
        self._task = TaskID(0)
        self._started = time.monotonic()
        self._printed = 0  # the last percentage of a line
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
        self._bar = Progress(*columns, TimeElapsedColumn(), console=console, disable=not console.is_terminal)
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text("")

    def __enter__(self) -> "Steps":
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def phase(self, text: str, measured: bool = False) -> None:
        """Begin a phase; `measured` means that the output of its command contains percentages."""
        if self._phase:
            self._bar.update(self._task, total=100, completed=100)
        self._phase, self._printed = text, 0
        self._task = self._bar.add_task(text, total=100 if measured else None)
        if not self._console.is_terminal:
            self._print(f"build-horovod: {text} …")

    def line(self, text: str) -> None:
        """Process one line of output of the running command."""
        if self._verbose:
            self._print(text)
        found = _PERCENT.match(text)
        if not found:
            return
        percent = int(found[1])
        self._bar.update(self._task, completed=percent)
        if not self._console.is_terminal and percent >= self._printed + _STEP:
            self._printed = percent - percent % _STEP
            seconds = time.monotonic() - self._started
            self._print(f"build-horovod: {self._phase}: {percent} % after {seconds:.0f} s")

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def run(
        self,
        command: Sequence[str | Path],
        failure: str,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        timeout: float = 3600,
        exit_code: int = 1,
    ) -> str:
        """Run one command to its end, and return its output.

        Args:
            command: The command and its arguments.
            failure: The first sentence of the error message if it fails.
            env: Its environment variables; by default those of this process.
            cwd: Its working folder.
            timeout: Time limit in seconds; a command that exceeds it is ended and has failed.
            exit_code: The exit code of the build if it fails.

        Raises:
            CannotBuild: It failed; the text has the lines with errors and the path of the log.
        """
        process = subprocess.Popen(
            command,
            env=env,
            cwd=cwd,
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        alarm = threading.Timer(timeout, _end, [process])
        alarm.start()
        lines = []
        try:
            with self.log.open("a") as log:
                log.write(f"$ {' '.join(map(str, command))}\n")
                for line in process.stdout or []:
                    log.write(line)
                    log.flush()
                    lines.append(line)
                    self.line(line.rstrip("\n"))
            code = process.wait()
        finally:
            alarm.cancel()
            _end(process)
        output = "".join(lines)
        if code:
            raise CannotBuild(f"{failure}\n{error_lines(output)}\nThe full log: {self.log}", exit_code)
        return output


def error_lines(output: str, most: int = 6) -> str:
    """Return the first lines with errors in the output of a failed command, or its last lines without any."""
    lines = [line.rstrip() for line in output.splitlines() if line.strip()]
    errors = list(dict.fromkeys(line for line in lines if _ERROR.search(line)))
    return "\n".join(f"  {line}" for line in errors[:most] or lines[-most:])


def _end(process: subprocess.Popen) -> None:
    """End a command and all that it started; it has its own session, so no other process is affected."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
