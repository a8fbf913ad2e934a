"""The device that a worker computes on, and what it must be able to do."""

import torch
import triton

from services.common.config import ConfigError

LEAST_CAPABILITY = (9, 0)
"""Hopper: kernels are launched before those in front have ended, and products read their tiles by bulk copies."""


def find_device(rank: int = 0, shards: int = 1) -> torch.device:
    """Return a rank's GPU, and make it the current one; where Triton is told to interpret its kernels
    (TRITON_INTERPRET=1), the CPU pretends to be one.

    Raises ConfigError if there is none, or one that is too old.
    """
    if triton.knobs.runtime.interpret:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
        raise ConfigError(
            f"--device is cuda, but torch {torch.__version__}, built {built}, finds no GPU: look whether nvidia-smi "
            "lists one, or give --device cpu"
        )
    if shards > torch.cuda.device_count():
        raise ConfigError(f"--shards is {shards}, a GPU each; torch finds {torch.cuda.device_count()}")
    torch.cuda.set_device(rank)
    capability = torch.cuda.get_device_capability()
    if capability < LEAST_CAPABILITY:
        name, (major, minor) = torch.cuda.get_device_name(), capability
        raise ConfigError(f"--device is cuda; {name} has compute capability {major}.{minor}, the least is 9.0 (H100)")
    return torch.device("cuda", torch.cuda.current_device())
