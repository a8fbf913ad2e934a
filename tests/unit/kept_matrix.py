"""A matrix that keeps its weight as it is, for tests that look at what was loaded."""

from torch import Tensor


class KeptMatrix:
    """A weight and its bias."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight = weight.clone()
        self.bias = bias
