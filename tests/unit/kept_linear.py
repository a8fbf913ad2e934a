"""A matrix that keeps its weight as it is, for tests that look at what was loaded."""

from torch import Tensor
from torch.nn.functional import linear


class KeptLinear:
    """A `Linear` with torch's own operator."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight = weight.clone()
        self.bias = bias

    def __call__(self, rows: Tensor) -> Tensor:
        return linear(rows, self.weight, self.bias)

    def add_to(self, sums: Tensor, rows: Tensor) -> None:
        sums += self(rows)
