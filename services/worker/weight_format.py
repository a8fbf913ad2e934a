"""What computes, and how an engine holds weights."""

from typing import Literal

Device = Literal["cpu", "cuda"]

WeightFormat = Literal["float32", "int8"]
"""On a CPU. int8: rounded to 8 bits, as the activations are that they are multiplied with."""

DeviceWeightFormat = Literal["float32", "bf16", "fp8"]
"""How a GPU holds the matrices of the layers. fp8: rounded to e4m3, by whoever stored them or as they are loaded,
with a scale for each output; what they are multiplied with is rounded row by row, and all else is bf16."""

KvFormat = Literal["auto", "fp8"]
"""How a GPU holds keys and values. auto: as what is computed: in float32, or else in bf16."""
