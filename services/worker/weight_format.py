"""How an engine holds weights."""

from typing import Literal

WeightFormat = Literal["float32", "int8"]
"""int8: rounded to 8 bits, as the activations are that they are multiplied with."""
