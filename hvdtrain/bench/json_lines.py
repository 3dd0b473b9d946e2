"""One JSON object a line: what the driver, the holders and the workers say to one another."""

import json
from collections.abc import Mapping
from typing import Any


def packed(message: Mapping[str, Any]) -> bytes:
    """Writes a message as the line that `Lines` reads."""
    return json.dumps(message).encode() + b"\n"


class Lines:
    """Cuts a stream of bytes into messages, however it arrives."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[dict[str, Any]]:
        """Takes what has arrived and returns the messages that are now complete.

        Raises:
            ValueError: If a line is no JSON.
        """
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [json.loads(line) for line in lines]
