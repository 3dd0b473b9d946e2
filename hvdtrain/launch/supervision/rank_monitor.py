"""Report the position of a running rank to the launcher, and its stacks on request."""

import json
import mmap
import os
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, fields, replace

from hvdtrain import heartbeat, process_activity
from hvdtrain.heartbeat import Beat, Limits, Note, Position
from hvdtrain.launch.supervision import protocol

# The signal on which a rank's faulthandler writes the stacks of all threads, even inside native code. No other
# software is known to use this real-time signal. It is sent only if /proc shows that the rank has a handler for it.
STACKS = signal.SIGRTMAX - 5
_ANSWER = 3.0  # seconds for a rank to write its stacks
_WRITTEN = 0.3  # seconds without output after which the stacks are complete
_MOST = 1 << 16  # maximum size of the stacks in bytes


class RankMonitor:
    """Watch the page and the process of one rank, and send changes to the launcher.

    Args:
        child: The rank's process id.
        page: The rank's heartbeat page.
        stacks: The non-blocking end of the pipe to which the rank's faulthandler writes.
        send: Sends a frame to the launcher.
    """

    def __init__(
        self, child: int, page: mmap.mmap, stacks: int, send: Callable[[bytes, bytes], None]
    ) -> None:
        self._child, self._page, self._stacks, self._send = child, page, stacks, send
        self._interval = _interval()
        self._life = process_activity.Life(child)
        self._note = Note()
        self._beat = Beat()
        self._sent: Beat | None = None
        self._due = 0.0
        self._text = b""
        self._requested_at: float | None = None
        self._received_at = 0.0

    @property
    def patience(self) -> float:
        """How many seconds the rank has requested to end by itself."""
        return heartbeat.read(self._page).patience

    def check(self) -> None:
        """Check the rank every few seconds; called a few times a second."""
        now = time.monotonic()
        if now >= self._due or self.patience != self._beat.patience:
            self._due = now + self._interval
            note = heartbeat.read(self._page)
            busy = self._life.busy(note.aside)
            self._send_position(note, busy or (note != self._note and note.since is None))
        if self._requested_at is not None and self._complete(now):
            self._requested_at = None
            self._answer()

    def request_stacks(self) -> None:
        """Request the stacks of the rank; once complete, they are sent to the launcher with its position."""
        if self._requested_at is None:
            self._text, self._requested_at, self._received_at = b"", time.monotonic(), time.monotonic()
            stopped = process_activity.state(self._child) in ("T", "t", "Z", "")
            if not stopped and process_activity.catches(self._child, STACKS):
                process_activity.signal_thread(self._child, heartbeat.read(self._page).listener, STACKS)
            else:
                self._requested_at -= _ANSWER  # answer without stacks at the next check

    def read_stacks(self) -> bool:
        """Read the output of the rank's faulthandler; return False at the end of the pipe."""
        try:
            data = os.read(self._stacks, _MOST)
        except BlockingIOError:
            return True
        self._text, self._received_at = (self._text + data)[:_MOST], time.monotonic()
        return bool(data)

    def send_last(self) -> None:
        """Send the position at which the rank has ended."""
        self._send_position(heartbeat.read(self._page), True)

    def _send_position(self, note: Note, busy: bool) -> None:
        """Send the position of the rank, if it has changed."""
        self._set_beat(note, busy)
        beat = _lasting(self._beat)
        if beat != self._sent:
            self._sent = beat
            self._send(protocol.BEAT, json.dumps(asdict(self._beat)).encode())

    def _set_beat(self, note: Note, busy: bool) -> None:
        waiting = None if note.since is None else max(time.monotonic() - note.since, 0.0)
        self._note = note
        self._beat = Beat(
            **{field.name: getattr(note, field.name) for field in fields(Position)},
            waiting=waiting,
            pid=self._child,
            state=process_activity.state(self._child),
            # A waiting rank uses CPU time inside MPI, which is no progress.
            busy=busy and (waiting is None or note.loose),
        )

    def _complete(self, now: float) -> bool:
        late = now > (self._requested_at or 0.0) + _ANSWER
        return late or (bool(self._text) and now > self._received_at + _WRITTEN)

    def _answer(self) -> None:
        self._set_beat(heartbeat.read(self._page), self._beat.busy)
        answer = {
            "beat": asdict(self._beat),
            "stacks": self._text.decode(errors="replace"),
            "waits_in": process_activity.waits_in(self._child),
        }
        self._send(protocol.STACK, json.dumps(answer).encode())


def _interval() -> float:
    try:
        return Limits.read().interval
    except ValueError:
        return Limits().interval  # the launcher reports the invalid value


def _lasting(beat: Beat) -> Beat:
    """Return a beat without what changes all the time: the waiting time, and whether it is running or sleeping."""
    waiting = None if beat.waiting is None else 0.0
    return replace(beat, waiting=waiting, state=beat.state if beat.state in ("T", "t", "D") else "")
