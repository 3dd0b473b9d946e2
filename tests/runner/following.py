"""Run one launch: read its output and its events, notice that it hangs, and end all that it started."""

import contextlib
import json
import os
import selectors
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable

from runner import descendants
from runner.events import PIPE, STACKS
from runner.launches import ROOT, Launch

# A launch hangs when for so long no rank has begun or ended a phase of a test. Nothing limits the whole: a slow
# machine, or one that does other work, takes longer. The longest phase takes half a minute on an idle machine.
PATIENCE = 900.0
# On slow machines it is this many times what the launch took to start Python and TensorFlow: 10 s on an idle one.
PATIENCE_IN_STARTS = 90
# Seconds that pytest and mpirun have to end what they started, when asked to.
GRACE = 20


class Stopped(BaseException):
    """A signal asks the runner to end."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def follow(
    launch: Launch, extra: list[str], heard: Callable[[dict], None], show: Callable[[str], None]
) -> int:
    """Run a launch to its end.

    Args:
        launch: What to start.
        extra: More arguments for pytest.
        heard: Called with each event that a rank reports, and with {"kind": "tick"} about once a second.
        show: Called with what the launch prints.

    Returns:
        The exit code; 124 for a launch that hung.
    """
    with tempfile.TemporaryDirectory() as folder:
        pipe = os.path.join(folder, "events")  # noqa: PTH118
        os.mkfifo(pipe)
        events = os.open(pipe, os.O_RDWR | os.O_NONBLOCK)  # with a writer of its own, so it never ends
        process = subprocess.Popen(
            launch.command(extra),
            cwd=ROOT,
            env=launch.environ() | {PIPE: pipe},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches the runner alone, which ends the rest in order
        )
        watch = _Watch(launch, process, events, heard, show)
        try:
            return watch.until_it_ends()
        finally:
            watch.end()
            os.close(events)


class _Watch:
    def __init__(self, launch, process, events, heard, show) -> None:
        self._launch, self._process, self._heard, self._show = launch, process, heard, show
        self._events, self._output = events, process.stdout.fileno()
        self._started = self._progress = time.monotonic()
        self._patience = PATIENCE
        self._ranks: dict[int, int] = {}  # each rank's process
        self._at: dict[int, str] = {}  # the test that each rank is in
        self._unread = b""
        self._selector = selectors.DefaultSelector()
        for source in (self._events, self._output):
            self._selector.register(source, selectors.EVENT_READ)

    def until_it_ends(self) -> int:
        while self._process.poll() is None:
            self._read(1.0)
            descendants.reap_orphans(self._process)
            self._heard({"kind": "tick"})
            if time.monotonic() - self._progress > self._patience:
                self._tell_hang()
                return 124
        self._read(0)
        return self._process.returncode

    def end(self) -> None:
        """End the launch, first by asking, and whatever it has left behind."""
        asked = self._process.poll() is None
        if asked:
            # mpirun ends its ranks, which are in groups of their own; pytest takes down the fixtures.
            self._process.send_signal(signal.SIGTERM if self._launch.size else signal.SIGINT)
            self._read_for(GRACE, lambda: self._process.poll() is None)
        elif descendants.descendants():
            self._read_for(GRACE, descendants.descendants)
        left = descendants.end_all()
        if left and not asked:
            self._show("Left running by tests, and ended:\n" + "".join(f"  {line[:200]}\n" for line in left))
        self._process.wait()
        self._process.stdout.close()
        self._selector.close()

    def _read_for(self, seconds: float, goes_on: Callable[[], object]) -> None:
        until = time.monotonic() + seconds
        while goes_on() and time.monotonic() < until:
            self._read(0.2)
            descendants.reap_orphans(self._process)

    def _read(self, seconds: float) -> None:
        """Wait for output or events, and hand on all that there is."""
        while ready := self._selector.select(seconds):
            seconds = 0
            for key, _ in ready:
                found = os.read(key.fd, 65536)
                if key.fd == self._events:
                    self._note(found)
                elif found:
                    self._show(found.decode(errors="replace"))
                else:
                    self._selector.unregister(key.fd)

    def _note(self, found: bytes) -> None:
        *lines, self._unread = (self._unread + found).split(b"\n")
        for event in map(json.loads, lines):
            self._progress = time.monotonic()
            kind, rank = event["kind"], event["rank"]
            if kind == "process":
                self._ranks[rank] = event["pid"]
            elif kind == "collected":
                self._patience = max(PATIENCE, PATIENCE_IN_STARTS * (self._progress - self._started))
            elif kind == "started":
                self._at[rank] = event["test"]
            self._heard(event)

    def _tell_hang(self) -> None:
        self._show(f"\n{self._launch} hangs: for {self._patience:.0f} s no test has begun or ended.\n")
        for rank, pid in sorted(self._ranks.items()):
            place = f" in {self._at[rank]}" if rank in self._at else ""
            self._show(f"\nRank {rank} (process {pid}){place}:\n")
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, STACKS)
            self._read_for(1, lambda: True)
        running = [f"  {pid} {descendants.command_of(pid)[:160]}\n" for pid in descendants.descendants()]
        self._show("\nStill running:\n" + "".join(running) + "\n")
        self._heard({"kind": "failed", "rank": 0, "test": self._at.get(0, str(self._launch))})
