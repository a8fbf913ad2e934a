"""A GGUF file's model in float32: the same weights for every engine, whatever it can read."""

from pathlib import Path

from gguf import GGUFReader, GGUFValueType, GGUFWriter
from gguf.constants import LlamaFileType
from gguf.quants import dequantize

WRITTEN_BY_WRITER = ("GGUF.version", "GGUF.tensor_count", "GGUF.kv_count", "general.architecture", "general.file_type")


def f32_copy(model: Path, folder: Path) -> Path:
    """Return a copy of a file with each tensor as float32, written to `folder` unless it is there already."""
    copy = folder / f"{model.stem}.f32.gguf"
    if not copy.exists():
        unfinished = copy.with_suffix(".unfinished")
        _write(GGUFReader(model), unfinished)
        unfinished.replace(copy)
    return copy


def _write(reader: GGUFReader, path: Path) -> None:
    writer = GGUFWriter(path, arch=reader.fields["general.architecture"].contents())
    writer.add_file_type(LlamaFileType.ALL_F32)
    for field in reader.fields.values():
        if field.name not in WRITTEN_BY_WRITER:
            inner = field.types[-1] if field.types[0] is GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=inner)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, dequantize(tensor.data, tensor.tensor_type))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
