"""What the front and a pool process say to each other over their socket pair: frames of a code and a payload.

    length of payload u32, little-endian | code u8 | payload

The process says READY once, when its model is read; then each frame to it is answered by one frame.
"""

import struct
from enum import IntEnum

HEADER = struct.Struct("<IB")


class Operation(IntEnum):
    """What a pool process is asked. The payload is the RPC's serialized request."""

    ENCODE = 1
    DECODE = 2
    SPELL = 3
    CHECK_FORMAT = 4


class Answer(IntEnum):
    """What it says."""

    READY = 1
    """The payload is empty."""
    DONE = 2
    """The payload is the RPC's serialized response."""
    REFUSED = 3
    """The input cannot be taken. The payload is the request's field, a line feed, and what is wrong. UTF-8."""
    FAILED = 4
    """A defect. The payload says where, without the error's text, which may quote the input. UTF-8."""


def header(code: Operation | Answer, payload: bytes) -> bytes:
    """Build the part of a frame before its payload."""
    return HEADER.pack(len(payload), code)


def frame(code: Operation | Answer, payload: bytes) -> bytes:
    """Build one frame."""
    return header(code, payload) + payload
