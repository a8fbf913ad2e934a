"""Kernels run where they can: on a CUDA device, or else in Triton's interpreter on the CPU."""

import os

import torch

# Read by Triton when a kernel's module is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
