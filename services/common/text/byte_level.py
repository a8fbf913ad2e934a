"""Byte-level vocabularies: each byte is written as a printable character (GPT-2's encoder.py)."""

from collections.abc import Mapping


def byte_level_alphabet() -> dict[int, str]:
    """Return the printable character that stands for each byte.

    Bytes that Latin-1 prints stand for themselves; the others, in order, are U+0100 and following.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + index) for index, byte in enumerate(others)}


def bytes_of_characters() -> Mapping[str, int]:
    """Return the byte that each character of the alphabet stands for."""
    return {character: byte for byte, character in byte_level_alphabet().items()}
