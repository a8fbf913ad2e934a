"""How sentencepiece writes tokens: `▁` for a space, and `<0x0A>` for a single byte."""

import re

SPACE = "▁"
_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")


def sentencepiece_bytes(text: str) -> bytes:
    """Return the bytes that a token says."""
    byte = _BYTE_TOKEN.fullmatch(text)
    return bytes.fromhex(byte[1]) if byte else text.replace(SPACE, " ").encode()
