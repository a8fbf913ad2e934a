"""Memory of each rank's device that all ranks' devices store into."""

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from services.common.config import ConfigError
from services.worker.rank_file import RankFile

_HANDLE_BYTES = 64
_LAZY_ENABLE_PEER_ACCESS = 1


@dataclass(frozen=True, slots=True)
class PeerMemory:
    """So many bytes of every rank, zeros at first, for as long as the process lives."""

    addresses: tuple[int, ...]
    """Where each rank's begin, as this one reaches them."""
    mapped: tuple[memoryview, ...] = ()
    """What keeps them there, if they are in the ranks' file."""

    def seat_addresses(self, first_byte: int, device: torch.device) -> Tensor:
        """Addresses for kernels: [world_size] int64."""
        return torch.tensor([address + first_byte for address in self.addresses], dtype=torch.int64, device=device)


def share_memory(num_bytes: int, file: RankFile, device: torch.device) -> PeerMemory:
    """Take memory, and map every other rank's. All ranks call it at once. Raises ConfigError.

    Ranks may share a device. One that is pretended has its memory in the file.
    """
    if device.type == "cpu":
        # As many are mapped by each rank as there are ranks: the same memory, at addresses of its own.
        parts = tuple(file.more(num_bytes) for _ in range(file.world_size))
        return PeerMemory(tuple(ctypes.addressof(ctypes.c_char.from_buffer(part)) for part in parts), parts)
    driver = _Driver()
    own = driver.allocate(num_bytes)
    handles = file.board.exchange(driver.handle_of(own))
    return PeerMemory(tuple(own if rank == file.rank else driver.open(handle) for rank, handle in enumerate(handles)))


class _Handle(ctypes.Structure):
    """The driver's CUipcMemHandle: handed over by value."""

    _fields_ = (("reserved", ctypes.c_char * _HANDLE_BYTES),)


class _Driver:
    """The few calls of the CUDA driver that torch has no public name for. torch's context must be current."""

    def __init__(self) -> None:
        torch.cuda.synchronize()
        self._library = ctypes.CDLL("libcuda.so.1")

    def allocate(self, num_bytes: int) -> int:
        address = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(num_bytes))
        self._call("cuMemsetD8_v2", address, ctypes.c_ubyte(0), ctypes.c_size_t(num_bytes))
        self._call("cuCtxSynchronize")
        return address.value

    def handle_of(self, address: int) -> bytes:
        handle = _Handle()
        self._call("cuIpcGetMemHandle", ctypes.byref(handle), ctypes.c_uint64(address))
        return bytes(handle)

    def open(self, handle: bytes) -> int:
        address = ctypes.c_uint64()
        flags = ctypes.c_uint(_LAZY_ENABLE_PEER_ACCESS)
        self._call("cuIpcOpenMemHandle_v2", ctypes.byref(address), _Handle.from_buffer_copy(handle), flags)
        return address.value

    def _call(self, name: str, *arguments: object) -> None:
        status = getattr(self._library, name)(*arguments)
        if status:
            text = ctypes.c_char_p()
            self._library.cuGetErrorName(status, ctypes.byref(text))
            raise ConfigError(f"devices cannot reach each other's memory: {name}: {(text.value or b'?').decode()}")
