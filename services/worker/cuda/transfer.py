"""Copies between the host and the device that nobody waits for."""

import torch
from torch import Tensor


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Copy a small tensor over in the stream's order; the host goes on at once."""
    if device.type == "cpu":
        return values
    return values.pin_memory().to(device, non_blocking=True)


def pinned(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Take memory of the host that the device can copy to and from by itself."""
    return torch.zeros(shape, dtype=dtype, pin_memory=device.type == "cuda")


class HostCopy:
    """A tensor of the device on its way to the host."""

    def __init__(self, values: Tensor) -> None:
        """The copy is made in the stream's order; `values` may be overwritten by what is launched after it."""
        self._values = values.clone() if values.device.type == "cpu" else values.to("cpu", non_blocking=True)

    def get(self) -> Tensor:
        """Return it. Only after an event that was recorded behind the copy."""
        return self._values
