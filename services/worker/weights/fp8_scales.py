"""What weights stored in fp8 are to be multiplied with: a number for a tensor, for each output, or for each block."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from services.common.model.errors import ModelFileError
from services.worker.weights.fp8_scheme import Fp8Scheme
from services.worker.weights.safetensors_files import SafetensorsFiles
from services.worker.weights.stored_decoder import StoredMatrix

_SUFFIXES = ("_scale_inv", "_scale")


@dataclass(frozen=True, slots=True)
class BlockScales:
    """Scales of what is wanted of a matrix."""

    by_block: Tensor
    """[num_rows, num_blocks] float32, of blocks of columns"""
    block_of: Tensor
    """[num_columns]: the block that a column is in"""

    @property
    def are_by_row(self) -> bool:
        """Whether each row has one."""
        return self.by_block.shape[1] == 1

    def largest(self) -> Tensor:
        """Return each row's largest: [num_rows]."""
        return self.by_block.amax(dim=1)

    def over_largest(self) -> "BlockScales":
        """Return them as shares of their row's largest."""
        return replace(self, by_block=self.by_block / self.largest()[:, None])

    def to(self, device: torch.device) -> "BlockScales":
        """Return them on a device."""
        return BlockScales(self.by_block.to(device), self.block_of.to(device))

    def of(self, rows: slice, columns: slice) -> Tensor:
        """Return what some of the weights are to be multiplied with: [num_rows, num_columns], or [num_rows, 1]."""
        by_block = self.by_block[rows]
        return by_block if self.are_by_row else by_block[:, self.block_of[columns]]


def read_scales(
    files: SafetensorsFiles, part: StoredMatrix, num_columns: int, columns: range, scheme: Fp8Scheme
) -> BlockScales:
    """Return the scales of a part's wanted rows and `columns`, of `num_columns`.

    Raises ModelFileError if they are missing, have another shape, or one is not a finite number above 0.
    """
    name = next((part.name + suffix for suffix in _SUFFIXES if part.name + suffix in files), None)
    if name is None:
        names = " nor ".join(repr(part.name + suffix) for suffix in _SUFFIXES)
        raise ModelFileError(
            files.path_of(part.name), f"tensor {part.name!r} is stored as fp8, but neither {names} is there"
        )
    if scheme.block_size:
        rows_a_block, columns_a_block = scheme.block_size
        scales = files.mapped(name, [-(-part.num_rows // rows_a_block), -(-num_columns // columns_a_block)])
    else:
        scales = files.mapped(name, [], [1], [1, 1], [part.num_rows], [part.num_rows, 1])
        columns_a_block = num_columns
        rows_a_block = part.num_rows if scales.numel() == 1 else 1
        scales = scales.view(-1, 1)
    scales = scales.float()
    bad = scales[~(scales.isfinite() & (scales > 0))]
    if len(bad):
        raise ModelFileError(
            files.path_of(name), f"tensor {name!r} has a scale of {float(bad[0])}; a finite number above 0 is expected"
        )
    row_blocks = torch.arange(part.rows.start, part.rows.stop) // rows_a_block
    column_blocks = torch.arange(columns.start, columns.stop) // columns_a_block
    first, last = int(column_blocks[0]), int(column_blocks[-1])
    return BlockScales(scales[row_blocks, first : last + 1], column_blocks - first)
