"""Connections of clients that cost little: requests are laid out as bytes, and answers are looked at as bytes.

A client in grpc.aio takes 250 us and more a call, on the processors that the servers need. Here it is 40 to 100.
"""

import socket
import struct
import time
from collections.abc import Iterator
from enum import Enum
from typing import NamedTuple, Protocol

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
"""Kinds of HTTP/2 frames (RFC 9113, section 6)."""
ACK = END_STREAM = 1
END_HEADERS = 4
FRAME_HEAD_BYTES = 9
NO_TABLE_AND_LARGE_WINDOW = struct.pack(">HIHI", 1, 0, 4, 1 << 24)
"""Settings: header fields come as they are, not as places in a table; streams need no further window."""
LARGER_CONNECTION_WINDOW = struct.pack(">I", 1 << 30)
RECEIVED_BYTES = 256 * 1024
LAST_EVENT = b"data: [DONE]\n\n\r\n0\r\n\r\n"
REFUSED_IN_GRPC = (b"grpc-status\x018", b"grpc-status-details-bin")
REFUSED_IN_HTTP = (b"HTTP/1.1 429 ", b"\r\nRetry-After: ")


class Is(Enum):
    """What a client has just heard."""

    REFUSED = "refused"
    ACCEPTED = "accepted"
    ENDED = "ended"


class Heard(NamedTuple):
    """An answer, and when its request was sent (monotonic s)."""

    what: Is
    sent_at_s: float


class Connection(Protocol):
    """One that is open. Raises ConnectionError for an answer that is neither the expected one nor a refusal."""

    socket: socket.socket

    def ask(self) -> None:
        """Send a request."""
        ...

    def heard(self, data: bytes) -> Iterator[Heard]:
        """Take what was received."""
        ...


class GrpcConnection:
    """HTTP/2, any number of requests at once."""

    def __init__(self, address: str, path: str, message: bytes) -> None:
        """`path`: of the method. `message`: serialized."""
        # Places in HTTP/2's static table (RFC 7541, appendix A): POST, http; :path and :authority, each with a value.
        self._head = b"\x83\x86\x04" + _text(path.encode()) + b"\x01" + _text(address.encode())
        for name, value in ((b"te", b"trailers"), (b"content-type", b"application/grpc")):
            self._head += b"\x00" + _text(name) + _text(value)
        self._body = b"\x00" + struct.pack(">I", len(message)) + message
        self._stream = -1
        self._sent_at_s: dict[int, float] = {}
        self._accepted: set[int] = set()
        self._left = b""
        self._is_ready = False
        self.socket = _connected(address)
        self.socket.sendall(
            PREFACE
            + _frame(SETTINGS, 0, 0, NO_TABLE_AND_LARGE_WINDOW)
            + _frame(WINDOW_UPDATE, 0, 0, LARGER_CONNECTION_WINDOW)
        )
        while not self._is_ready:
            for _ in self.heard(self.socket.recv(RECEIVED_BYTES)):
                raise ConnectionError("an answer without a request")

    def ask(self) -> None:
        """Send a request."""
        self._stream += 2
        request = _frame(HEADERS, END_HEADERS, self._stream, self._head)
        request += _frame(DATA, END_STREAM, self._stream, self._body)
        self._sent_at_s[self._stream] = time.monotonic()
        self.socket.sendall(request)

    def heard(self, data: bytes) -> Iterator[Heard]:
        """Take what was received."""
        if not data:
            raise ConnectionError("the server closed the connection")
        data = self._left + data
        at = 0
        while len(data) - at >= FRAME_HEAD_BYTES:
            end = at + FRAME_HEAD_BYTES + int.from_bytes(data[at : at + 3])
            if end > len(data):
                break
            kind, flags, stream = data[at + 3], data[at + 4], int.from_bytes(data[at + 5 : at + 9])
            what = self._frame(kind, flags, stream, data[at + FRAME_HEAD_BYTES : end])
            if what:
                yield Heard(what, self._sent_at_s[stream])
            at = end
        self._left = data[at:]

    def _frame(self, kind: int, flags: int, stream: int, payload: bytes) -> Is | None:
        if kind == DATA and stream not in self._accepted:
            self._accepted.add(stream)
            return Is.ACCEPTED
        if kind == HEADERS and flags & END_STREAM:
            if stream in self._accepted:
                return Is.ENDED
            if all(each in payload for each in REFUSED_IN_GRPC):
                return Is.REFUSED
            raise ConnectionError(f"stream {stream} ended with {payload!r}")
        if kind == SETTINGS:
            if flags & ACK:
                self._is_ready = True
            else:
                self.socket.sendall(_frame(SETTINGS, ACK, 0))
        elif kind == PING and not flags & ACK:
            self.socket.sendall(_frame(PING, ACK, 0, payload))
        elif kind in (RST_STREAM, GOAWAY):
            raise ConnectionError(f"stream {stream} was broken: {payload!r}")
        return None


class HttpConnection:
    """HTTP/1.1: one request at a time, whose answer is a stream of events."""

    def __init__(self, address: str, path: str, body: bytes) -> None:
        """`body`: JSON."""
        head = (
            f"POST {path} HTTP/1.1\r\nHost: {address}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        self._request = head.encode() + body
        self._received = b""
        self._accepted = False
        self._sent_at_s = 0.0
        self.socket = _connected(address)

    def ask(self) -> None:
        """Send the request."""
        self._received, self._accepted = b"", False
        self._sent_at_s = time.monotonic()
        self.socket.sendall(self._request)

    def heard(self, data: bytes) -> Iterator[Heard]:
        """Take what was received."""
        if not data:
            raise ConnectionError("the server closed the connection")
        self._received += data
        head, is_whole, body = self._received.partition(b"\r\n\r\n")
        if not is_whole:
            return
        if head.startswith(b"HTTP/1.1 200 "):
            if not self._accepted:
                self._accepted = True
                yield Heard(Is.ACCEPTED, self._sent_at_s)
            if body.endswith(LAST_EVENT):
                yield Heard(Is.ENDED, self._sent_at_s)
        elif all(each in head for each in REFUSED_IN_HTTP):
            if body.endswith(b"}}"):
                yield Heard(Is.REFUSED, self._sent_at_s)
        else:
            raise ConnectionError(f"the answer is {self._received!r}")


def _connected(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    connection = socket.create_connection((host, int(port)))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def _frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return len(payload).to_bytes(3) + bytes((kind, flags)) + stream.to_bytes(4) + payload


def _text(text: bytes) -> bytes:
    """Of under 127 bytes, as header fields have it."""
    return bytes((len(text),)) + text
