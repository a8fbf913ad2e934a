"""What the kernels' tests share: where they run, and how near is near enough."""

import torch
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
IS_CUDA = DEVICE.type == "cuda"
# The interpreter multiplies the bits of bfloat16 as if they were whole numbers.
DTYPES = (torch.float32, torch.bfloat16 if IS_CUDA else torch.float16)
# Of a result's norm. bfloat16's own rounding is up to 2^-9 of each value.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 6e-3, torch.float16: 1e-3}


def assert_near(actual: Tensor, expected: Tensor, dtype: torch.dtype | None = None) -> None:
    """The difference's norm is small beside what is expected; NaN is near nothing."""
    limit = TOLERANCE[dtype or expected.dtype]
    actual, expected = actual.double(), expected.double()
    error = float((actual - expected).norm() / expected.norm().clamp_min(1e-30))
    assert error <= limit, f"relative error {error:.2e}, at most {limit:.0e}"


def random(generator: torch.Generator, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values of the standard normal distribution, drawn on the CPU: the same on every machine."""
    return torch.randn(shape, generator=generator).to(dtype).to(DEVICE)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
