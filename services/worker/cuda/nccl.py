"""Sums over ranks by NCCL, in place and in the stream's order: for what is too large to be stored twice as long.

Called directly: torch.distributed wants a rendezvous of its own, and watches graphs' captures from another thread.
"""

import ctypes

import torch
from torch import Tensor

from services.worker.rank_file import RankFile

_ID_BYTES = 128
_SUM = 0
_TYPES = {torch.float16: 6, torch.float32: 7, torch.bfloat16: 9}


class NcclError(RuntimeError):
    """NCCL could not do what was asked."""


class _Id(ctypes.Structure):
    """NCCL's ncclUniqueId: handed over by value."""

    _fields_ = (("internal", ctypes.c_char * _ID_BYTES),)


class Nccl:
    """A rank's seat in a communicator of all ranks, each with a device of its own, which is the current one."""

    def __init__(self, file: RankFile) -> None:
        """All ranks do it at once. Raises NcclError."""
        self._library = ctypes.CDLL("libnccl.so.2")
        self._library.ncclGetErrorString.restype = ctypes.c_char_p
        unique = _Id()
        if file.rank == 0:
            self._call("ncclGetUniqueId", ctypes.byref(unique))
        unique = _Id.from_buffer_copy(file.board.exchange(bytes(unique))[0])
        self._communicator = ctypes.c_void_p()
        self._call(
            "ncclCommInitRank", ctypes.byref(self._communicator), ctypes.c_int(file.world_size), unique,
            ctypes.c_int(file.rank),
        )  # fmt: skip

    def sum(self, values: Tensor) -> None:
        """Make values, contiguous, the sums of what every rank has there."""
        assert values.is_contiguous()
        address = ctypes.c_void_p(values.data_ptr())
        self._call(
            "ncclAllReduce", address, address, ctypes.c_size_t(values.numel()), ctypes.c_int(_TYPES[values.dtype]),
            ctypes.c_int(_SUM), self._communicator, ctypes.c_void_p(torch.cuda.current_stream().cuda_stream),
        )  # fmt: skip

    def _call(self, name: str, *arguments: object) -> None:
        status = getattr(self._library, name)(*arguments)
        if status:
            raise NcclError(f"{name}: {self._library.ncclGetErrorString(status).decode()}")
