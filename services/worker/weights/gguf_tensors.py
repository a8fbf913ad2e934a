"""The tensors of a GGUF file: made to float32 on the CPU, whatever they are for."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from services.common.model.errors import ModelFileError
from services.common.model.ggml_types import GGML_TYPES
from services.common.model.gguf import GgufFile, TensorInfo
from services.worker.weights.dequantize import SUPPORTED_TYPES, dequantize
from services.worker.weights.stored_decoder import ON_THE_CPU, Destination, StoredMatrix, Weight

_ROWS_AT_ONCE = 256


class GgufTensors:
    """Reads tensors out of a mapped file, and keeps count of those read."""

    def __init__(self, file: GgufFile, destination: Destination = ON_THE_CPU) -> None:
        """Map the file. Raises ModelFileError if it cannot be."""
        self._file = file
        self._destination = destination
        try:
            num_bytes = file.path.stat().st_size
            self._data = torch.from_file(str(file.path), shared=False, size=num_bytes, dtype=torch.uint8)
        except (OSError, RuntimeError) as cause:
            raise ModelFileError(file.path, f"cannot be read: {cause}") from cause
        self._read: set[str] = set()

    @property
    def path(self) -> Path:
        """The file."""
        return self._file.path

    def __contains__(self, name: str) -> bool:
        return name in self._file.tensors

    def on(self, destination: Destination) -> "GgufTensors":
        """Return the same tensors for another place."""
        return GgufTensors(self._file, destination)

    def vector(self, name: str, length: int) -> Tensor:
        """Return a tensor of one dimension: [length]. Raises ModelFileError."""
        data = self._stored(name, (length,))
        out = torch.empty(length)
        dequantize(data, self._file.tensors[name].ggml_type, out)
        return out.to(self._destination.device)

    def table(self, part: StoredMatrix, num_columns: int) -> Tensor:
        """Return what is wanted of a matrix; as in StoredTensors. Raises ModelFileError."""
        return self.matrix([part], num_columns).values

    def matrix(self, parts: Sequence[StoredMatrix], num_columns: int, columns: range | None = None) -> Weight:
        """Return what is wanted of matrices, one below the other; as in StoredTensors. Raises ModelFileError."""
        # Looked at before memory is taken: the sizes are a file's claims until then.
        stored = [self._stored(part.name, (num_columns, part.num_rows)) for part in parts]
        columns = columns or range(num_columns)
        out = torch.empty((sum(len(part.rows) for part in parts), len(columns)))
        first_row = 0
        for part, data in zip(parts, stored, strict=True):
            # A row is whole blocks, so that rows are runs of bytes; columns are not.
            rows = data.view(part.num_rows, -1)[part.rows.start : part.rows.stop]
            to = out[first_row : first_row + len(part.rows)]
            first_row += len(part.rows)
            self._dequantize(rows, part.name, num_columns, columns, to)
        return Weight(out.to(self._destination.kind).to(self._destination.device))

    def _dequantize(self, rows: Tensor, name: str, num_columns: int, columns: range, out: Tensor) -> None:
        """Write some columns of stored rows to `out`; whole rows are in memory only a few at a time."""
        ggml_type = self._file.tensors[name].ggml_type
        if len(columns) == num_columns:
            dequantize(rows.flatten(), ggml_type, out)
            return
        for stored, to in zip(torch.split(rows, _ROWS_AT_ONCE), torch.split(out, _ROWS_AT_ONCE), strict=True):
            whole = torch.empty((len(stored), num_columns))
            dequantize(stored.flatten(), ggml_type, whole)
            to.copy_(whole[:, columns.start : columns.stop])

    def check_all_read(self) -> None:
        """Raise ModelFileError if the file has a tensor that was never read: the model is not what it was taken for."""
        for name in self._file.tensors:
            if name not in self._read:
                raise ModelFileError(self._file.path, f"tensor {name!r} has no place in this architecture")

    def _stored(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Return a tensor's bytes in the file, after a look at its shape (innermost first) and type."""
        info = self._file.tensor(name)
        if info.shape != shape:
            raise ModelFileError(self._file.path, f"tensor {name!r} has shape {info.shape}; expected {shape}")
        if info.ggml_type not in SUPPORTED_TYPES:
            raise ModelFileError(self._file.path, f"tensor {name!r} is {_type_name(info)}; {_SUPPORTED} can be read")
        self._read.add(name)
        return self._data[info.offset : info.offset + info.num_bytes]


_SUPPORTED = ", ".join(GGML_TYPES[ggml_type].name for ggml_type in SUPPORTED_TYPES)


def _type_name(info: TensorInfo) -> str:
    known = GGML_TYPES.get(info.ggml_type)
    return f"stored as {known.name}" if known else f"of the unknown type {info.ggml_type}"
