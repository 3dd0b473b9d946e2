"""Define the protocol between the guard process of a rank and the launcher, and both ends of their connection.

The guard sends frames: one byte for the kind, four bytes for the length, and the payload. The launcher sends orders
of one byte: a byte below LOOK is the number of a signal for the rank. If the connection ends, the guard ends its
rank; if it ends without the order END, the launcher itself has ended.
"""

import base64
import contextlib
import hmac
import json
import os
import secrets
import selectors
import socket
import struct
from collections.abc import Sequence

HELLO, STDOUT, STDERR, REPORT, EXIT = b"H", b"O", b"E", b"R", b"X"
# The position of a rank, sent when it has changed; the answer to LOOK, with the stacks.
BEAT, STACK = b"B", b"S"
# Not sent: the kind of the event that a connection has ended.
CLOSED = b"-"

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
_CHUNK = 1 << 18
_LOST = 30.0  # seconds after which data for a lost host is no longer retransmitted

Event = tuple[int, bytes, bytes]


def pack(kind: bytes, payload: bytes) -> bytes:
    """Return the frame of a payload, which `Frames` splits again."""
    return _HEADER.pack(kind, len(payload)) + payload


class Frames:
    """Split a stream of bytes, received in pieces of any size, into frames."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def feed(self, data: bytes) -> list[tuple[bytes, bytes]]:
        """Add received bytes, and return the (kind, payload) pairs of the frames that are now complete."""
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


class Connection:
    """The guard's end of a connection."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock

    def send(self, kind: bytes, payload: bytes) -> None:
        """Send one frame; errors are ignored, because a lost launcher is detected when orders are read."""
        with contextlib.suppress(OSError):
            self.socket.sendall(pack(kind, payload))


def connect() -> socket.socket | None:
    """Connect to the launcher that the environment names; return None if it names none that can be reached."""
    named = [entry.rpartition(":") for entry in os.environ.get(ADDRESS, "").split(",") if entry]
    addresses = [(host, int(port)) for host, _, port in named]
    srun = os.environ.get("SLURM_LAUNCH_NODE_IPADDR")
    if srun and addresses:
        addresses.append((srun, addresses[0][1]))
    for address in addresses:
        try:
            sock = socket.create_connection(address, timeout=3)
        except OSError:
            continue
        sock.settimeout(None)
        _keep_alive(sock)
        return sock
    return None


class _Peer:
    """The launcher's end of a connection; its rank is known once its HELLO frame has contained the token."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self.rank: int | None = None
        self.frames = Frames()


class Server:
    """The server to which the guards of all ranks connect.

    Args:
        selector: The launcher's selector, with which the sockets are registered.
        addresses: Addresses of this host for the guards; empty if all guards are on this host.
    """

    def __init__(self, selector: selectors.BaseSelector, addresses: Sequence[str]) -> None:
        self._selector = selector
        self._peers: list[_Peer] = []
        self._token = secrets.token_hex(16)
        self._listener = socket.create_server(("" if addresses else "127.0.0.1", 0), backlog=1024)
        self._listener.setblocking(False)
        port = self._listener.getsockname()[1]
        self._address = ",".join(f"{name}:{port}" for name in addresses or ["127.0.0.1"])
        selector.register(self._listener, selectors.EVENT_READ, self._accept)

    @property
    def environ(self) -> dict[str, str]:
        """The variables that the guards need to connect."""
        return {ADDRESS: self._address, TOKEN: self._token}

    @property
    def connected(self) -> bool:
        """Whether any guard is connected."""
        return any(peer.rank is not None for peer in self._peers)

    def order(self, number: int) -> None:
        """Send every guard an order: a signal for its rank, LOOK or END."""
        for peer in self._peers:
            with contextlib.suppress(OSError):
                peer.socket.send(bytes([number]), socket.MSG_DONTWAIT)

    def end(self) -> None:
        """Tell every guard to end its rank; frames that they still send are still received."""
        self.order(END)
        self.stop_sending()

    def send(self, data: bytes) -> None:
        """Send bytes to every authenticated peer; a closed connection is noticed by the next read."""
        for peer in self._peers:
            if peer.rank is not None:
                with contextlib.suppress(OSError):
                    peer.socket.sendall(data)

    def stop_sending(self) -> None:
        """Close all connections in one direction; what the peers still send is received."""
        for peer in self._peers:
            with contextlib.suppress(OSError):
                peer.socket.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Close all connections."""
        for peer in [*self._peers]:
            self._drop(peer)
        self._selector.unregister(self._listener)
        self._listener.close()

    def _accept(self) -> list[Event]:
        sock, _ = self._listener.accept()
        _keep_alive(sock)
        peer = _Peer(sock)
        self._peers.append(peer)
        self._selector.register(sock, selectors.EVENT_READ, lambda: self._receive(peer))
        return []

    def _receive(self, peer: _Peer) -> list[Event]:
        try:
            data = peer.socket.recv(_CHUNK)
        except OSError:
            data = b""
        if not data:
            self._drop(peer)
            return [(peer.rank, CLOSED, b"")] if peer.rank is not None else []
        events = []
        for kind, payload in peer.frames.feed(data):
            if peer.rank is None:
                peer.rank = self._authenticate(kind, payload)
            if peer.rank is None:
                self._drop(peer)
                break
            events.append((peer.rank, kind, payload))
        return events

    def _authenticate(self, kind: bytes, payload: bytes) -> int | None:
        """Return the rank that a frame with the token names; None for any other frame."""
        try:
            hello = json.loads(payload) if kind == HELLO else {}
            return int(hello["rank"]) if hmac.compare_digest(hello["token"], self._token) else None
        except (ValueError, KeyError, TypeError):
            return None

    def _drop(self, peer: _Peer) -> None:
        self._peers.remove(peer)
        self._selector.unregister(peer.socket)
        peer.socket.close()


def _keep_alive(sock: socket.socket) -> None:
    """Set options with which a connection to a lost host ends within half a minute."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    # Keep-alive probes are not sent while data is unacknowledged; then TCP_USER_TIMEOUT applies.
    options = {
        "TCP_KEEPIDLE": 10,
        "TCP_KEEPINTVL": 5,
        "TCP_KEEPCNT": 3,
        "TCP_USER_TIMEOUT": int(_LOST * 1000),
    }
    for option, value in options.items():
        if hasattr(socket, option):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
