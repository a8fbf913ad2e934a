"""What the ranks of a worker do together within a step, on devices."""

from dataclasses import dataclass

import torch
from torch import Tensor

from services.worker.cuda.nccl import Nccl
from services.worker.cuda.peer_memory import share_memory
from services.worker.engine.runner import RanksDisagreeError, RanksLostError
from services.worker.kernels.choose_token import RANK_WORDS
from services.worker.kernels.peers import BROKEN, DIFFERENT, MOST_LOOKS, STATE_SIZE, Seat
from services.worker.kernels.rows import Scaled
from services.worker.kernels.scale_rows import scale_rows
from services.worker.kernels.share_rows import PART, places_for, share_rows
from services.worker.rank_file import RankFile
from services.worker.runner.models.decoder_weights import DecoderConfig
from services.worker.runner.models.shard import Shard

FEW_BYTES = 8 << 20
"""A rank stores up to so much of a sum to others, who add it up in the norm that reads it; larger sums are NCCL's. See
docs/gpu-ranks.md."""
WHOLE_ROWS_AT_ONCE = 16
"""Of logits that are made whole."""
LOOKS = 1 << 23
"""How often a program looks for what another rank gives. Some seconds: for ranks that compile a kernel in the midst of
steps, one after the other. That a process is gone, or stands still, others see before."""
PRETENDED_LOOKS = 1 << 18
"""The same in Triton's interpreter, where a look takes some tenths of a millisecond."""


@dataclass(frozen=True, slots=True)
class MostRows:
    """Of a step."""

    num_rows: int
    num_samples: int
    dtype: torch.dtype
    """Of what is summed."""


class DeviceRanks:
    """One rank's seat among the ranks: all launch the same in the same order."""

    def __init__(
        self, file: RankFile, config: DecoderConfig, most: MostRows, device: torch.device, *, has_nccl: bool
    ) -> None:
        """`config` is the whole model's. All ranks do it at once. `has_nccl`: large sums are NCCL's; else the norms
        that read them sum them all.

        Raises ConfigError and NcclError.
        """
        self.shard = Shard(file.rank, file.world_size)
        self._config = config
        parts = [Shard(rank, file.world_size).vocabulary(config) for rank in range(file.world_size)]
        self._most_columns = max(map(len, parts))
        self._first_columns = torch.tensor(
            [*(part.start for part in parts), config.vocabulary_size], dtype=torch.int32, device=device
        )
        self._nccl = Nccl(file) if has_nccl else None
        self._state = torch.zeros(STATE_SIZE, dtype=torch.int32, device=device)
        self._state[MOST_LOOKS] = LOOKS if device.type == "cuda" else PRETENDED_LOOKS
        row_bytes = config.hidden_size * most.dtype.itemsize * (file.world_size - 1)
        # Programs beyond those that a device holds at once begin in their order on every rank, so that the first one
        # that waits is always met.
        sizes = [
            (min(most.num_rows, FEW_BYTES // row_bytes), Seat.words_of(config.hidden_size, most.dtype)),
            (most.num_samples, RANK_WORDS),
            (places_for(WHOLE_ROWS_AT_ONCE, self._most_columns), PART),
        ]
        takes = [Seat.num_bytes(num_places, file.world_size, num_words) for num_places, num_words in sizes]
        self._memory = share_memory(sum(takes), file, device)
        self.sums, self.choices, self._whole = (
            Seat(
                rank=file.rank,
                world_size=file.world_size,
                addresses=self._memory.seat_addresses(sum(takes[:number]), device),
                counts=torch.zeros(num_places, dtype=torch.int32, device=device),
                num_words=num_words,
                state=self._state,
            )
            for number, (num_places, num_words) in enumerate(sizes)
        )

    def are_few(self, num_rows: int) -> bool:
        """Whether rows are summed by the norm that reads them, at `sums`."""
        return self._nccl is None or num_rows <= self.sums.num_places

    def sum(self, product: Scaled, *, pdl: bool) -> Scaled:
        """Sum a product of many rows, which is whole and in the model's type, over ranks; in place.

        A rank multiplies its scales in before: they are of its own rows.
        """
        assert self._nccl is not None
        if product.row_scales is not None:
            scale_rows(product, pdl=pdl)
        self._nccl.sum(product.product)
        return Scaled(product.product)

    def whole(self, logits: Tensor) -> Tensor:
        """Make rows whole of which each rank has a part: [num_rows, vocabulary_size], in memory of their own."""
        whole = logits.new_empty((len(logits), self._config.vocabulary_size))
        for first in range(0, len(logits), WHOLE_ROWS_AT_ONCE):
            rows = slice(first, first + WHOLE_ROWS_AT_ONCE)
            share_rows(logits[rows], whole[rows], self._first_columns, self._most_columns, self._whole)
        return whole

    @property
    def state(self) -> Tensor:
        """For `check`, once it is on the host."""
        return self._state

    @staticmethod
    def check(state: Tensor) -> None:
        """Raise RanksLostError or RanksDisagreeError if a step's numbers mean nothing."""
        broken = int(state[BROKEN])
        if broken == DIFFERENT:
            raise RanksDisagreeError("ranks differ in a hidden state")
        if broken:
            raise RanksLostError("a device waited for another rank's in vain")
