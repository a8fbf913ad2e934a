"""The tensors of a folder's safetensors files, brought to a device."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from services.worker.weights.safetensors_files import SafetensorsFiles
from services.worker.weights.staging import Staging
from services.worker.weights.stored_decoder import ON_THE_CPU, Destination, StoredMatrix


class FolderTensors:
    """Tensors of mapped files; as in StoredTensors."""

    def __init__(self, files: SafetensorsFiles, destination: Destination = ON_THE_CPU) -> None:
        self._files = files
        self._destination = destination
        self._staging = Staging(destination.device)

    @property
    def path(self) -> Path:
        """The folder."""
        return self._files.path

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def on(self, destination: Destination) -> "FolderTensors":
        """Return the same tensors for another place."""
        return FolderTensors(self._files, destination)

    def vector(self, name: str, length: int) -> Tensor:
        """Return a tensor of one dimension: [length]. Raises ModelFileError."""
        # A copy, also where nothing changes: what it is read from is the mapped file.
        return self._files.mapped(name, [length]).to(self._destination.device, torch.float32, copy=True)

    def matrix(self, parts: Sequence[StoredMatrix], num_columns: int, columns: range | None = None) -> Tensor:
        """Return what is wanted of matrices, one below the other; as in StoredTensors. Raises ModelFileError."""
        # Looked at before memory is taken: the sizes are a file's claims until then.
        stored = [self._files.mapped(part.name, [part.num_rows, num_columns]) for part in parts]
        columns = columns or range(num_columns)
        num_rows, to = sum(len(part.rows) for part in parts), self._destination
        out = torch.empty((num_rows, len(columns)), dtype=to.kind, device=to.device)
        places = torch.split(out, [len(part.rows) for part in parts])
        for part, whole, place in zip(parts, stored, places, strict=True):
            wanted = whole[part.rows.start : part.rows.stop, columns.start : columns.stop]
            for some_rows, some_columns, piece in self._staging.pieces(wanted):
                place[some_rows, some_columns] = piece
        return out

    def check_all_read(self) -> None:
        """Raise ModelFileError if there is a tensor that was never read: the model is not what it was taken for."""
        self._files.check_all_read()
