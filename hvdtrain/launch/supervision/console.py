"""Print the output of all ranks: rank 0 unmodified, the others line by line, without start-up messages."""

import re
import sys
import time
from typing import BinaryIO

from hvdtrain.launch.supervision.protocol import STDERR, STDOUT

# Seconds that a line of another rank, or an unfinished line of rank 0 itself, waits for rank 0 to finish its line.
WAIT = 0.25

# Messages that TensorFlow prints at every start.
NOISE = re.compile(
    rb"WARNING: All log messages before absl::InitializeLog\(\) is called"
    rb"|To enable the following instructions:"
    rb"|I\d{4} \d\d:\d\d:\d+\.\d+ +\d+ [\w./]+\.(cc|h):\d+\] "
    rb"|\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d+: I "
    rb"|[WE]\d{4} [^\n]*(Unable to register cu\w+ factory|computation placer already registered)"
    rb"|\d{4}-\d\d-\d\d [^\n]*(Unable to register cu\w+ factory|TF-TRT Warning)"
)

# A drawn progress bar of Keras 3, Keras 2 or tqdm. Text after it on the same line is kept.
COLOUR = re.compile(rb"\x1b\[[\d;]*[mK]")
_NUMBER = rb"(?:-?\d[\d.]*(?:e[+-]?\d+)?|nan|-?inf)"
BAR = re.compile(
    rb"\s*\d+/(?:\d+|Unknown) (?:\xe2\x94\x81)* ?\S+ [\d.]+\w*/(?:step|epoch)(?: - [^\s:]+: "
    + _NUMBER
    + rb")*\s*"
    rb"|\s*\d+/(?:\d+|Unknown) \[[=>.]+\][^\n]*"
    rb"|[^\n|]*\d+%\|[^|\n]*\|[^\n]*"
)
EPOCH = re.compile(rb"Epoch \d+/\d+\s*")


class Console:
    """Print the output of all ranks without mixing their lines.

    The output of rank 0 is written unmodified, so that progress bars work. Lines of other ranks are written as a
    whole, at the start of a line and with a `[rank]` prefix; their progress bars are omitted. The start-up messages
    of TensorFlow are shown only if `verbose`.
    """

    def __init__(self, verbose: bool, stdout: BinaryIO | None = None, stderr: BinaryIO | None = None) -> None:
        self._verbose = verbose
        self._files = {STDOUT: stdout or sys.stdout.buffer, STDERR: stderr or sys.stderr.buffer}
        self._rests: dict[tuple[int, bytes], bytes] = {}
        self._held: list[tuple[bytes, bytes]] = []
        self._held_since = 0.0
        self._rest_since = 0.0
        self._mid_line: bytes | None = None  # the stream on which rank 0 is in the middle of a line
        self._mid_error = False

    def write(self, rank: int, stream: bytes, data: bytes) -> None:
        """Print what a rank has written to one of its streams."""
        if rank != 0:
            self._write_other_rank(rank, stream, data)
        elif stream == STDERR and not self._verbose:
            self._write_rank_zero_error(data)
        else:
            self._write_rank_zero(stream, data)

    def tick(self) -> None:
        """Print output that was held long enough; called a few times a second."""
        now = time.monotonic()
        if self._rests.get((0, STDERR)) and now > self._rest_since + WAIT:
            self._release_error()
        if self._held and now > self._held_since + WAIT:
            self._start_line()

    def finish(self) -> None:
        """Print all remaining output, including unfinished lines."""
        self._release_error()
        for rank, stream in list(self._rests):
            if rank and self._rests[rank, stream]:
                self._write_other_rank(rank, stream, b"\n")
        if self._held:
            self._start_line()

    def say(self, text: str) -> None:
        """Print a message of the launcher on a new line."""
        self._start_line()
        self._put(STDERR, text.encode(errors="replace") + b"\n")

    def _write_rank_zero(self, stream: bytes, data: bytes) -> None:
        whole = data.rfind(b"\n") + 1
        if whole:
            self._put(stream, data[:whole])
            self._mid_line = None
            self._release_held()
        if data[whole:]:
            self._put(stream, data[whole:])
            self._mid_line = stream

    def _write_rank_zero_error(self, data: bytes) -> None:
        rest = self._rests.get((0, STDERR), b"")
        if not rest:
            self._rest_since = time.monotonic()
        *lines, rest = (rest + data).split(b"\n")
        shown = b""
        for line in lines:
            if self._mid_error or not NOISE.match(line):
                shown += line + b"\n"
            self._mid_error = False
        if shown:
            self._write_rank_zero(STDERR, shown)
        self._rests[0, STDERR] = rest
        # A progress bar must be shown before its line ends.
        if b"\r" in rest or self._mid_error:
            self._release_error()

    def _release_error(self) -> None:
        rest = self._rests.pop((0, STDERR), b"")
        if rest:
            self._mid_error = True
            self._write_rank_zero(STDERR, rest)

    def _write_other_rank(self, rank: int, stream: bytes, data: bytes) -> None:
        *lines, rest = (self._rests.get((rank, stream), b"") + data).split(b"\n")
        # Only the last drawing of a progress bar is needed; keeping all of an epoch would need much memory.
        self._rests[rank, stream] = rest[max(rest.rfind(b"\r", 0, len(rest) - 1), 0) :]
        shown = [kept for line in lines if (kept := self._keep(stream, line)) is not None]
        if not shown:
            return
        if not self._held:
            self._held_since = time.monotonic()
        self._held.append((stream, b"".join(b"[%d] %s\n" % (rank, line) for line in shown)))
        if not self._mid_line:
            self._release_held()

    def _keep(self, stream: bytes, line: bytes) -> bytes | None:
        """Return the part of another rank's line to print, or None."""
        if not self._verbose and stream == STDERR and NOISE.match(line):
            return None
        if EPOCH.fullmatch(line):
            return None
        if b"\r" not in line.rstrip(b"\r"):
            return line.rstrip(b"\r")
        last = re.split(rb"[\r\b]+", line.rstrip(b"\r"))[-1]
        plain = COLOUR.sub(b"", last)
        kept = BAR.sub(b"", plain, count=1) if BAR.match(plain) else last
        return kept if kept.strip() else None

    def _start_line(self) -> None:
        if self._mid_line:
            self._put(self._mid_line, b"\n")
            self._mid_line = None
        self._release_held()

    def _release_held(self) -> None:
        held, self._held = self._held, []
        for stream, lines in held:
            self._put(stream, lines)

    def _put(self, stream: bytes, data: bytes) -> None:
        self._files[stream].write(data)
        self._files[stream].flush()
