"""What a rank's guard and the launcher say to each other: frames up, orders of one byte down.

A frame is one byte of kind, four of length, and the payload. Downwards a byte below LOOK is the number of a
signal for the rank. The end of the stream means: end your rank; without END before it, the launcher is gone.
"""

import base64
import json
import struct
from collections.abc import Sequence

HELLO, STDOUT, STDERR, REPORT, EXIT = b"H", b"O", b"E", b"R", b"X"
# Where a rank is, when that has changed; the answer to LOOK, with its stacks.
BEAT, STACK = b"B", b"S"

# Orders: tell where your rank is, with its stacks; end it now, the launcher has been patient.
LOOK, END = 128, 129

ADDRESS = "HVDTRAIN_RUN_ADDRESS"
TOKEN = "HVDTRAIN_RUN_TOKEN"
BIND = "HVDTRAIN_BIND"
# The command that started the job, without the options that say what kind of script it runs.
TYPED = "HVDTRAIN_RUN_TYPED"

# The first word of a rank's command where the script is one for Horovod.
AS_HOROVOD = "--as-horovod"

# Opens a line on a guard's standard output that carries a frame when no connection could be made.
RECORD = b"hvdtrain-record "

_PACKED = "--packed"
_HEADER = struct.Struct("!cI")


def pack(kind: bytes, payload: bytes) -> bytes:
    """Put a payload into the frame that `Frames` takes apart."""
    return _HEADER.pack(kind, len(payload)) + payload


class Frames:
    """Cuts a stream of bytes into frames, however the network has cut it."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def feed(self, data: bytes) -> list[tuple[bytes, bytes]]:
        """Take what has arrived.

        Args:
            data: The next bytes of the stream.

        Returns:
            The (kind, payload) pairs that are now complete.
        """
        self._bytes += data
        frames = []
        while len(self._bytes) >= _HEADER.size:
            kind, length = _HEADER.unpack_from(self._bytes)
            end = _HEADER.size + length
            if len(self._bytes) < end:
                break
            frames.append((kind, bytes(self._bytes[_HEADER.size : end])))
            del self._bytes[:end]
        return frames


def pack_words(words: Sequence[str]) -> list[str]:
    """Hide a lone ":" from MPI launchers, which take it for the start of another command."""
    if ":" not in words:
        return [*words]
    return [_PACKED, base64.b64encode(json.dumps(words).encode()).decode()]


def unpack_words(words: Sequence[str]) -> list[str]:
    """Return back what `pack_words` was given."""
    if len(words) == 2 and words[0] == _PACKED:
        return list(json.loads(base64.b64decode(words[1])))
    return [*words]
