"""Define the protocol between the guard process of a rank and the launcher.

The guard sends frames: one byte for the kind, four bytes for the length, and the payload. The launcher sends orders
of one byte: a byte below LOOK is the number of a signal for the rank. If the connection ends, the guard ends its
rank; if it ends without the order END, the launcher itself has ended.
"""

import base64
import json
import struct
from collections.abc import Sequence

HELLO, STDOUT, STDERR, REPORT, EXIT = b"H", b"O", b"E", b"R", b"X"
# The position of a rank, sent when it has changed; the answer to LOOK, with the stacks.
BEAT, STACK = b"B", b"S"

# Orders: send the position and the stacks of the rank; end the rank now, without the time it has requested.
LOOK, END = 128, 129

ADDRESS = "HVDTRAIN_RUN_ADDRESS"
TOKEN = "HVDTRAIN_RUN_TOKEN"
BIND = "HVDTRAIN_BIND"
# The command that started the job, without --as-horovod, --wrap and --scale-batch.
TYPED = "HVDTRAIN_RUN_TYPED"

# The first word of a rank's command if the script is written for Horovod.
AS_HOROVOD = "--as-horovod"

# The beginning of a line on a guard's standard output that contains a frame, if the guard has no connection.
RECORD = b"hvdtrain-record "

_PACKED = "--packed"
_HEADER = struct.Struct("!cI")


def pack(kind: bytes, payload: bytes) -> bytes:
    """Return the frame of a payload, which `Frames` splits again."""
    return _HEADER.pack(kind, len(payload)) + payload


class Frames:
    """Split a stream of bytes, received in pieces of any size, into frames."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def feed(self, data: bytes) -> list[tuple[bytes, bytes]]:
        """Add received bytes.

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


def pack_command(command: Sequence[str]) -> list[str]:
    """Encode a command that contains the word ":", which MPI launchers take for the start of another command."""
    if ":" not in command:
        return [*command]
    return [_PACKED, base64.b64encode(json.dumps(command).encode()).decode()]


def unpack_command(command: Sequence[str]) -> list[str]:
    """Decode the result of `pack_command`."""
    if len(command) == 2 and command[0] == _PACKED:
        return list(json.loads(base64.b64decode(command[1])))
    return [*command]
