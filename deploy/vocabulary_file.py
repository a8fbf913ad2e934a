"""Copies a GGUF file without its tensors: `python -m deploy.vocabulary_file MODEL.gguf VOCABULARY.gguf`.

What a tokenizer reads of a model is in the metadata; the copy is a whole GGUF file, of 2 MB instead of 98.
"""

import struct
import sys
from pathlib import Path

from services.common.model.gguf import MAGIC, read_gguf

_TENSOR_COUNT = slice(8, 16)
"""Behind the magic and the version: the number of tensors, u64, little-endian."""


def write_vocabulary(model: Path, vocabulary: Path) -> None:
    """Write the copy. Raises ModelFileError if the model is no sound GGUF file."""
    metadata_end = read_gguf(model).metadata_end
    with model.open("rb") as file:
        header = bytearray(file.read(metadata_end))
    assert header.startswith(MAGIC)
    header[_TENSOR_COUNT] = struct.pack("<Q", 0)
    vocabulary.write_bytes(header)


if __name__ == "__main__":
    write_vocabulary(Path(sys.argv[1]), Path(sys.argv[2]))
