"""The compiled kernels, for this processor. What each function takes is said where it is defined, in the C files."""

import ctypes
import functools
from pathlib import Path

import torch  # its OpenMP is what the kernels' threads are of: it is loaded before them
from torch import Tensor

from services.common.config import ConfigError

_LIBRARIES = Path(__file__).parent / "lib"
_POINTER, _INT64, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA = map(ctypes.c_long, (158, 0x1023, 18))
"""A system call of x86-64, and what is asked by it (the kernel's Documentation/arch/x86/xstate.rst)."""
_SIGNATURES = {
    "shoal_attention": [*[_POINTER] * 4, _INT64, _POINTER, _INT],
    "shoal_forward": [*[_POINTER] * 5, _INT],
    "shoal_linear": [*[_POINTER] * 4, _INT64, _POINTER, _INT],
    "shoal_meet": [_POINTER],
    "shoal_rms_norm": [*[_POINTER] * 3, *[_INT64] * 2, _FLOAT, _INT],
    "shoal_rotate_and_store": [*[_POINTER] * 5, _FLOAT, _POINTER, _INT],
    "shoal_swiglu": [*[_POINTER] * 2, *[_INT64] * 2, _INT],
}
_CONSTANTS = ("shoal_max_head_dim", "shoal_max_tile_queries", "shoal_panel_outputs")


@functools.cache
def kernels() -> ctypes.CDLL:
    """Load the library for this processor's instructions.

    Raises ConfigError if it was not built.
    """
    path = _LIBRARIES / f"{instruction_set()}.so"
    if not path.exists():
        raise ConfigError(
            f"the CPU kernels are not built: there is no {path}. "
            "`make setup` builds them, or: python -m services.worker.cpu_kernels.build"
        )
    library = ctypes.CDLL(str(path))
    for name, parameters in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes = parameters
        function.restype = None
    for name in _CONSTANTS:
        getattr(library, name).restype = _INT64
    return library


def instruction_set() -> str:
    """Return the widest instruction set with kernels that this processor has; not above ATEN_CPU_CAPABILITY."""
    capability, features = torch.backends.cpu.get_cpu_capability(), torch.cpu.get_capabilities()
    if capability == "AVX512" and features.get("avx512_vnni"):
        return "amx" if features.get("amx_int8") and _may_use_tiles() else "avx512"
    return "avx2" if capability in ("AVX512", "AVX2") else "generic"


def _may_use_tiles() -> bool:
    """Ask the system to keep AMX's tiles, 8 KiB a thread, for this process: until then, using them ends it."""
    return int(ctypes.CDLL(None).syscall(_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA)) == 0


def address(tensor: Tensor, dtype: torch.dtype = torch.float32) -> int:
    """Return where a tensor's values lie. They are to lie one behind the other, and to be of the type that the kernel
    reads: both are asserted.
    """
    assert tensor.dtype == dtype, tensor.dtype
    assert tensor.is_contiguous()
    return tensor.data_ptr()
