"""Encode messages as one JSON object a line."""

import json
from collections.abc import Mapping
from typing import Any


def pack_message(message: Mapping[str, Any]) -> bytes:
    """Return a message as the line that `MessageBuffer` reads."""
    return json.dumps(message).encode() + b"\n"


class MessageBuffer:
    """Splits a stream of bytes, which arrives in pieces of any size, into messages."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[dict[str, Any]]:
        """Add bytes of the stream and return the messages that are now complete.

        Raises:
            ValueError: If a line is not JSON.
        """
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [json.loads(line) for line in lines]
