"""The tensors of a folder's safetensors files, brought to a device."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from services.common.model.errors import ModelFileError
from services.worker.weights.fp8_scales import BlockScales, read_scales
from services.worker.weights.fp8_scheme import UNUSED_SUFFIXES, Fp8Scheme
from services.worker.weights.safetensors_files import FLOATS, FP8, SafetensorsFiles
from services.worker.weights.staging import Staging
from services.worker.weights.stored_decoder import ON_THE_CPU, Destination, StoredMatrix, Weight


class FolderTensors:
    """Tensors of mapped files; as in StoredTensors."""

    def __init__(
        self, files: SafetensorsFiles, scheme: Fp8Scheme | None, destination: Destination = ON_THE_CPU
    ) -> None:
        """`scheme`: how weights are stored in fp8; None: none is."""
        self._files = files
        self._scheme = scheme
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
        return FolderTensors(self._files, self._scheme, destination)

    def vector(self, name: str, length: int) -> Tensor:
        """Return a tensor of one dimension: [length]. Raises ModelFileError."""
        # A copy, also where nothing changes: what it is read from is the mapped file.
        return self._files.mapped(name, [length]).to(self._destination.device, torch.float32, copy=True)

    def table(self, part: StoredMatrix, num_columns: int) -> Tensor:
        """Return what is wanted of a matrix; as in StoredTensors. Raises ModelFileError."""
        stored = self._stored(part, num_columns, range(num_columns))
        out = torch.empty(stored.values.shape, dtype=self._destination.kind, device=self._destination.device)
        self._bring(stored, out)
        return out

    def matrix(self, parts: Sequence[StoredMatrix], num_columns: int, columns: range | None = None) -> Weight:
        """Return what is wanted of matrices, one below the other; as in StoredTensors. Raises ModelFileError."""
        # Looked at before memory is taken: the sizes are a file's claims until then.
        stored = [self._stored(part, num_columns, columns or range(num_columns)) for part in parts]
        to, scales = self._destination, None
        if self._scheme and to.keeps_fp8:
            scales = torch.cat([self._scales_to_keep(one).largest() for one in stored])
        num_rows, num_wanted = [len(one.values) for one in stored], stored[0].values.shape[1]
        kind = to.kind if scales is None else torch.float8_e4m3fn
        out = torch.empty((sum(num_rows), num_wanted), dtype=kind, device=to.device)
        for one, place in zip(stored, torch.split(out, num_rows), strict=True):
            self._bring(one, place)
        return Weight(out, scales)

    def check_all_read(self) -> None:
        """Raise ModelFileError if there is a tensor that was never read: the model is not what it was taken for."""
        self._files.check_all_read(UNUSED_SUFFIXES if self._scheme else ())

    def _stored(self, part: StoredMatrix, num_columns: int, columns: range) -> "_Stored":
        types = (*FLOATS, FP8) if self._scheme else FLOATS
        whole = self._files.mapped(part.name, [part.num_rows, num_columns], types=types)
        values = whole[part.rows.start : part.rows.stop, columns.start : columns.stop]
        if not self._scheme or whole.dtype != torch.float8_e4m3fn:
            return _Stored(part.name, values, None)
        scales = read_scales(self._files, part, num_columns, columns, self._scheme)
        return _Stored(part.name, values, scales.to(self._destination.device))

    def _scales_to_keep(self, stored: "_Stored") -> BlockScales:
        if stored.scales is None:
            # It was left out when the others were rounded; to round it here would not be what was meant.
            raise ModelFileError(
                self._files.path_of(stored.name),
                f"tensor {stored.name!r} is stored as {stored.values.dtype}, not in fp8 like others of this model; "
                "--dtype fp8 wants all matrices of its layers in fp8, --dtype bf16 takes them as they are",
            )
        return stored.scales

    def _bring(self, stored: "_Stored", out: Tensor) -> None:
        """Write a matrix to `out`, multiplied with its scales; if that is in fp8 too, short of its rows' largest ones.

        A product has one scale an output: where a row's blocks have several, those of smaller ones are rounded again.
        """
        scales = stored.scales
        if scales and out.dtype == stored.values.dtype:
            scales = None if scales.are_by_row else scales.over_largest()
        for rows, columns, piece in self._staging.pieces(stored.values):
            out[rows, columns] = piece.float() * scales.of(rows, columns) if scales else piece


@dataclass(frozen=True, slots=True)
class _Stored:
    """What is wanted of a matrix."""

    name: str
    values: Tensor
    """As they lie in the file."""
    scales: BlockScales | None
    """On the device; None: they are not in fp8."""
