"""Mapped tensors brought to a device, piece by piece, through two buffers of pinned memory.

While one piece is on its way to the device, the next is read out of the file. Host memory and the device's are taken
once and stay as they are, however large a model is.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

PIECE_BYTES = 16 << 20
"""Of a buffer: a third of a millisecond of a PCIe 5 link, so that a copy's start does not count."""


class Staging:
    """The way of a model's tensors to one device. On a CPU the same, but nothing is pinned."""

    def __init__(self, device: torch.device) -> None:
        self._piece_bytes = PIECE_BYTES
        self._buffers = [_Buffer(self._piece_bytes, device) for _ in range(2)]

    def pieces(self, stored: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
        """Yield what lies in a file, [num_rows, num_columns], in pieces: which rows, which columns, and what is there,
        on the device, in the type it is stored in.

        A piece's memory is taken again by the next but one: it may be worked with on the current stream only.
        """
        num_rows, num_columns = stored.shape
        most_values = self._piece_bytes // stored.element_size()
        columns_at_once = min(num_columns, most_values)
        rows_at_once = most_values // columns_at_once
        for row in range(0, num_rows, rows_at_once):
            for column in range(0, num_columns, columns_at_once):
                rows, columns = slice(row, row + rows_at_once), slice(column, column + columns_at_once)
                yield rows, columns, self._buffers[0].bring(stored[rows, columns])
                self._buffers.reverse()


class _Buffer:
    """Room for a piece on the host, and on the device."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        is_cuda = device.type == "cuda"
        self._host = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=is_cuda)
        self._device = torch.empty(num_bytes, dtype=torch.uint8, device=device) if is_cuda else self._host
        self._is_free = torch.cuda.Event() if is_cuda else None  # type: ignore[no-untyped-call]
        """Recorded behind the copy out of the host's room."""

    def bring(self, piece: Tensor) -> Tensor:
        num_bytes = piece.numel() * piece.element_size()
        host, there = self._host[:num_bytes], self._device[:num_bytes]
        if self._is_free:
            self._is_free.synchronize()
        # As bytes: those of a type that torch does not compute in are copied as fast.
        host.view(len(piece), -1).copy_(piece.view(torch.uint8))
        if self._is_free:
            there.copy_(host, non_blocking=True)
            self._is_free.record()
        return there.view(piece.dtype).view(piece.shape)
