"""What a person sees of a build that takes minutes, and what is kept of it when it fails."""

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
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)

from hvdtrain.horovod_build.target import CannotBuild

_PERCENT = re.compile(r"^\s*\[\s*(\d+)%\]")
_TELLING = re.compile(r"error:|CMake Error|undefined reference|No space left|Killed", re.IGNORECASE)
_STEP = 20


class BuildProgress:
    """Shows each phase and its time: a bar in a terminal, a line now and then elsewhere."""

    def __init__(self, console: Console, verbose: bool = False):
        self._console = console
        self._verbose = verbose
        self._phase = ""
        self._started = time.monotonic()
        self._told = 0
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
        self._bar = Progress(*columns, TimeElapsedColumn(), console=console, disable=not console.is_terminal)

    def __enter__(self) -> "BuildProgress":
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def phase(self, text: str, measured: bool = False) -> None:
        """Begins a phase; `measured` says that percentages will come."""
        self._finish_phase()
        self._phase, self._told = text, 0
        self._task = self._bar.add_task(text, total=100 if measured else None)
        if not self._console.is_terminal:
            self._say(f"{text} …")

    def line(self, text: str) -> None:
        """Takes a line of the running command's output."""
        if self._verbose:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)
        found = _PERCENT.match(text)
        if found:
            self._percent(int(found.group(1)))

    def _percent(self, value: int) -> None:
        self._bar.update(self._task, completed=value)
        if not self._console.is_terminal and value >= self._told + _STEP:
            self._told = value - value % _STEP
            self._say(f"{self._phase}: {value} % after {time.monotonic() - self._started:.0f} s")

    def _finish_phase(self) -> None:
        if self._phase:
            self._bar.update(self._task, total=100, completed=100)

    def _say(self, text: str) -> None:
        self._console.print(f"build-horovod: {text}", markup=False, highlight=False, soft_wrap=True)


class Steps:
    """Runs the commands of a build: one log for all, and none of their processes left behind."""

    def __init__(self, log: Path, progress: BuildProgress):
        self.log = log
        self._progress = progress
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text("")

    def run(
        self,
        command: Sequence[str | Path],
        failure: str,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        timeout: float = 3600,
        exit_code: int = 1,
    ) -> str:
        """Runs one command to its end.

        Args:
            command: The command and its arguments.
            failure: The sentence that opens the error if it fails.
            env: Its environment; this process's own by default.
            cwd: Its working folder.
            timeout: Seconds after which it is ended and has failed.
            exit_code: The exit code that its failure gives the build.

        Returns:
            What it printed.

        Raises:
            CannotBuild: It failed; the telling lines of its output and the path of the log are in the text.
        """
        words = [str(word) for word in command]
        process = subprocess.Popen(
            words,
            env=dict(env) if env is not None else None,
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
        try:
            output = self._follow(process, words)
            code = process.wait()
        finally:
            alarm.cancel()
            _end(process)
        if code:
            raise CannotBuild(f"{failure}\n{telling_lines(output)}\nThe full log: {self.log}", exit_code)
        return output

    def _follow(self, process: subprocess.Popen, words: list[str]) -> str:
        lines = []
        with self.log.open("a") as log:
            log.write(f"$ {' '.join(words)}\n")
            for line in process.stdout or []:
                log.write(line)
                log.flush()
                lines.append(line)
                self._progress.line(line.rstrip("\n"))
        return "".join(lines)


def telling_lines(output: str, most: int = 6) -> str:
    """Picks the lines of a failed command's output that say why: its first errors, else its last lines."""
    lines = [line.rstrip() for line in output.splitlines() if line.strip()]
    telling = list(dict.fromkeys(line for line in lines if _TELLING.search(line)))
    return "\n".join(f"  {line}" for line in telling[:most] or lines[-most:])


def _end(process: subprocess.Popen) -> None:
    """Ends a command and all that it started; its session is its own, so nothing else is hit."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()
