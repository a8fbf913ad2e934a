"""The paged KV cache on the device: allocated once, addressed by block tables."""

from collections.abc import Sequence

import torch

from services.worker.engine.step_plan import BlockCopy
from services.worker.kernels.paged_kv import PagedLayer
from services.worker.kernels.rows import FP8
from services.worker.runner.models.decoder_weights import DecoderConfig


class DeviceKvCache:
    """Keys and values of all layers that a rank computes: its own key heads."""

    def __init__(
        self, config: DecoderConfig, num_blocks: int, block_size_tokens: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """`config` is the rank's."""
        self.num_blocks = num_blocks
        self.block_size_tokens = block_size_tokens
        shape = (config.num_layers, num_blocks, 2, config.num_kv_heads, block_size_tokens, config.head_dim)
        # Cleared: what lies in a slot that nobody wrote must not be NaN, which no weight of 0 takes away.
        self._kv = torch.zeros(shape, dtype=dtype, device=device)
        self.is_fp8 = dtype == FP8
        self.layers = tuple(PagedLayer(kv) for kv in self._kv)

    def fill_randomly(self) -> None:
        """Write noise everywhere: a device reads and multiplies zeros with less power, and so faster, than data."""
        noise = torch.randn(self._kv.shape[2:], dtype=torch.float32, device=self._kv.device).to(self._kv.dtype)
        self._kv.copy_(noise.expand(self._kv.shape))

    def copy(self, copies: Sequence[BlockCopy]) -> None:
        """Copy whole blocks, in all layers; all sources are read before anything is written."""
        if not copies:
            return
        device = self._kv.device
        sources = torch.tensor([copy.source for copy in copies], device=device)
        destinations = torch.tensor([copy.destination for copy in copies], device=device)
        self._kv.index_copy_(1, destinations, self._kv.index_select(1, sources))
