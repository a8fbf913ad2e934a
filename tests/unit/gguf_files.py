"""Writes small GGUF files for tests: right ones, and the parts to make wrong ones of."""

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

from services.common.text.byte_level import byte_level_alphabet

U32, I32, F32, BOOL, STRING, ARRAY, U64 = 4, 5, 6, 7, 8, 9, 10
ALIGNMENT = 32

# A metadata value with its type number; arrays are (ARRAY, (element type, values)).
Value = tuple[int, object]


def text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def encoded(value: Value) -> bytes:
    kind, content = value
    if kind == ARRAY:
        assert isinstance(content, tuple)
        element_kind, elements = content
        return struct.pack("<IQ", element_kind, len(elements)) + b"".join(encoded((element_kind, e)) for e in elements)
    if kind == STRING:
        assert isinstance(content, str)
        return text(content)
    return struct.pack({U32: "<I", I32: "<i", F32: "<f", BOOL: "<B", U64: "<Q"}[kind], content)


def gguf_bytes(
    metadata: Mapping[str, Value], tensors: Mapping[str, tuple[Sequence[int], int, bytes]], version: int = 3
) -> bytes:
    """Build a file of metadata, and tensors as (shape, ggml type, data)."""
    out = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
    for key, value in metadata.items():
        out += text(key) + struct.pack("<I", value[0]) + encoded(value)
    data = b""
    for name, (shape, ggml_type, raw) in tensors.items():
        out += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, ggml_type, len(data))
        data += raw + bytes(-len(raw) % ALIGNMENT)
    return out + bytes(-len(out) % ALIGNMENT) + data


def tiny_tokenizer_metadata(template: str | None = None) -> dict[str, Value]:
    """A byte-level vocabulary: two special tokens, every byte, and the words 'ab' and 'abc'."""
    tokens = ["<|end|>", "<|begin|>", *byte_level_alphabet().values(), "ab", "abc"]
    metadata: dict[str, Value] = {
        "general.architecture": (STRING, "llama"),
        "llama.context_length": (U32, 128),
        "tokenizer.ggml.model": (STRING, "gpt2"),
        "tokenizer.ggml.pre": (STRING, "smollm"),
        "tokenizer.ggml.tokens": (ARRAY, (STRING, tokens)),
        "tokenizer.ggml.token_type": (ARRAY, (I32, [3, 3, *[1] * (len(tokens) - 2)])),
        "tokenizer.ggml.merges": (ARRAY, (STRING, ["a b", "ab c"])),
        "tokenizer.ggml.eos_token_id": (U32, 0),
        "tokenizer.ggml.bos_token_id": (U32, 1),
    }
    if template is not None:
        metadata["tokenizer.chat_template"] = (STRING, template)
    return metadata


def tiny_model(folder: Path, metadata: Mapping[str, Value], name: str = "tiny.gguf") -> Path:
    """Write a file with this metadata and one tensor."""
    path = folder / name
    path.write_bytes(gguf_bytes(metadata, {"weight": ((4, 2), 0, bytes(32))}))
    return path
