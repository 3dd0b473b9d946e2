"""What a guard tells the launcher of its rank while that runs: where it is, and on request its stacks."""

import json
import mmap
import os
import signal
import time
from collections.abc import Callable
from dataclasses import asdict

from hvdtrain import heartbeat, process_activity
from hvdtrain.heartbeat import Beat, Note
from hvdtrain.launch.supervision import protocol
from hvdtrain.timeouts import Limits

# Asks a rank's faulthandler for the stacks of all threads, in the middle of native code too. A real-time signal
# that nothing else is known to use; its handler is seen in /proc before it is sent.
STACKS = signal.SIGRTMAX - 5
_ANSWER = 3.0  # seconds for a rank to write its stacks
_WRITTEN = 0.3  # seconds of silence after which they are complete
_MOST = 1 << 16  # bytes of stacks that are passed on


class Pulse:
    """Watches the page and the process of one rank; it sends something only when something has changed.

    Args:
        child: The rank's process id.
        page: The rank's page.
        stacks: Where its faulthandler writes, a pipe's end that does not block.
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
        self._asked: float | None = None
        self._heard = 0.0

    @property
    def patience(self) -> float:
        """For how many seconds the rank wants to end by itself."""
        return heartbeat.read(self._page).patience

    def turn(self) -> None:
        """Look at the rank every few seconds; to be called a few times a second."""
        now = time.monotonic()
        if now >= self._due or self.patience != self._beat.patience:
            self._due = now + self._interval
            self._look()
            self.tell()
        if self._asked is not None and self._complete(now):
            self._asked = None
            self._answer()

    def look(self) -> None:
        """Ask the rank for its stacks and, when they are there, tells the launcher all that is known."""
        if self._asked is None:
            self._text, self._asked, self._heard = b"", time.monotonic(), time.monotonic()
            if self._can_answer():
                process_activity.signal_thread(self._child, heartbeat.read(self._page).listener, STACKS)
            else:
                self._asked -= _ANSWER

    def hear(self) -> bool:
        """Read what the rank's faulthandler has written; False when it will write no more."""
        try:
            data = os.read(self._stacks, _MOST)
        except BlockingIOError:
            return True
        self._text, self._heard = (self._text + data)[:_MOST], time.monotonic()
        return bool(data)

    def tell(self) -> None:
        """Send where the rank is, if that has changed."""
        if self._same(self._sent, self._beat):
            return
        self._sent = self._beat
        self._send(protocol.BEAT, json.dumps(asdict(self._beat)).encode())

    def last(self) -> None:
        """Send where the rank was when it ended."""
        self._see(heartbeat.read(self._page), True)
        self.tell()

    def _look(self) -> None:
        note = heartbeat.read(self._page)
        busy = self._life.busy(note.aside)
        self._see(note, busy or (note != self._note and note.since is None))

    def _see(self, note: Note, busy: bool) -> None:
        waiting = None if note.since is None else max(time.monotonic() - note.since, 0.0)
        self._note = note
        self._beat = Beat(
            epoch=note.epoch,
            step=note.step,
            doing=note.doing,
            waiting=waiting,
            loose=note.loose,
            among=note.among,
            waits=note.waits,
            patience=note.patience,
            pid=self._child,
            state=process_activity.state(self._child),
            # What MPI burns while it waits says nothing.
            busy=busy and (waiting is None or note.loose),
        )

    @staticmethod
    def _same(one: Beat | None, other: Beat) -> bool:
        return one is not None and _lasting(one) == _lasting(other)

    def _can_answer(self) -> bool:
        stopped = process_activity.state(self._child) in ("T", "t", "Z", "")
        return not stopped and process_activity.catches(self._child, STACKS)

    def _complete(self, now: float) -> bool:
        late = now > (self._asked or 0.0) + _ANSWER
        return late or (bool(self._text) and now > self._heard + _WRITTEN)

    def _answer(self) -> None:
        self._see(heartbeat.read(self._page), self._beat.busy)
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
        return Limits().interval  # the launcher has refused already, or says so


def _lasting(beat: Beat) -> dict:
    """What of a beat is news: that time passes is none, and of what runs, whether it runs this very moment."""
    facts = asdict(beat)
    facts["waiting"] = beat.waiting is not None
    facts["state"] = beat.state if beat.state in ("T", "t", "D") else ""
    return facts
