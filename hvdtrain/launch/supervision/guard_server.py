"""Accept connections from the guard processes, authenticate them, and return the frames that they send."""

import contextlib
import hmac
import json
import secrets
import selectors
import socket
from collections.abc import Sequence

from hvdtrain.launch.supervision import protocol
from hvdtrain.launch.supervision.rank_guard import keep_alive

CLOSED = b"-"
CHUNK = 1 << 18

Event = tuple[int, bytes, bytes]


class Peer:
    """One connection; its rank is known once its HELLO frame has contained the token."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self.frames = protocol.Frames()
        self.rank: int | None = None


class Server:
    """The server to which the guards of all ranks connect.

    Args:
        selector: The launcher's selector, with which the sockets are registered.
        addresses: Addresses of this host for the guards; empty if all guards are on this host.
    """

    def __init__(self, selector: selectors.BaseSelector, addresses: Sequence[str]) -> None:
        self._selector = selector
        self._peers: list[Peer] = []
        self._token = secrets.token_hex(16)
        self._listener = socket.create_server(("" if addresses else "127.0.0.1", 0), backlog=1024)
        self._listener.setblocking(False)
        port = self._listener.getsockname()[1]
        self._address = ",".join(f"{name}:{port}" for name in addresses or ["127.0.0.1"])
        selector.register(self._listener, selectors.EVENT_READ, self._accept)

    @property
    def environ(self) -> dict[str, str]:
        """The variables that the guards need to connect."""
        return {protocol.ADDRESS: self._address, protocol.TOKEN: self._token}

    @property
    def connected(self) -> bool:
        """Whether any guard is connected."""
        return any(peer.rank is not None for peer in self._peers)

    def order(self, number: int) -> None:
        """Send every guard an order: a signal for its rank, or one of those in `protocol`."""
        for peer in self._peers:
            with contextlib.suppress(OSError):
                peer.socket.send(bytes([number]), socket.MSG_DONTWAIT)

    def end(self) -> None:
        """Tell every guard to end its rank; frames that they still send are still received."""
        self.order(protocol.END)
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
        keep_alive(sock)
        peer = Peer(sock)
        self._peers.append(peer)
        self._selector.register(sock, selectors.EVENT_READ, lambda: self._receive(peer))
        return []

    def _receive(self, peer: Peer) -> list[Event]:
        try:
            data = peer.socket.recv(CHUNK)
        except OSError:
            data = b""
        if not data:
            self._drop(peer)
            return [(peer.rank, CLOSED, b"")] if peer.rank is not None else []
        events = []
        for kind, payload in peer.frames.feed(data):
            if peer.rank is None and not self._authenticate(peer, kind, payload):
                self._drop(peer)
                break
            if peer.rank is not None:
                events.append((peer.rank, kind, payload))
        return events

    def _authenticate(self, peer: Peer, kind: bytes, payload: bytes) -> bool:
        try:
            hello = json.loads(payload) if kind == protocol.HELLO else {}
            if not hmac.compare_digest(hello.get("token", ""), self._token):
                return False
            peer.rank = int(hello["rank"])
        except (ValueError, KeyError, TypeError, AttributeError):
            return False
        return True

    def _drop(self, peer: Peer) -> None:
        self._peers.remove(peer)
        self._selector.unregister(peer.socket)
        peer.socket.close()
