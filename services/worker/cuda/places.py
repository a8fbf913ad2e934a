"""Where the device keeps what a runner remembers of sequences: a place each, as long as it is in the running set."""

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from services.worker.engine.sequence import SequenceId
from services.worker.engine.step_plan import SequenceChunk

_Numbers = NDArray[np.int32]


class Places:
    """Sequences' places and block tables. A plan does not say when one has ended: the one unused for longest gives way.

    With twice as many places as a step has sequences, none gives way that a step in flight still speaks of.
    """

    def __init__(self, num_places: int, table_blocks: int) -> None:
        """`table_blocks`: most blocks of a sequence."""
        self._place_of: OrderedDict[SequenceId, int] = OrderedDict()
        self._free = list(range(num_places))
        self._block_tables: list[tuple[int, ...]] = [()] * num_places
        self._tables: _Numbers = np.zeros((num_places, table_blocks), dtype=np.int32)

    def of(self, chunks: Sequence[SequenceChunk]) -> tuple[_Numbers, _Numbers]:
        """Return the chunks' places, [num_chunks], and block tables, [num_chunks, table_blocks]."""
        places = np.fromiter(map(self._of, chunks), dtype=np.int32, count=len(chunks))
        return places, self._tables[places]

    def _of(self, chunk: SequenceChunk) -> int:
        place = self._place_of.get(chunk.sequence_id)
        if place is None:
            place = self._free.pop() if self._free else self._place_of.popitem(last=False)[1]
            self._place_of[chunk.sequence_id] = place
        else:
            self._place_of.move_to_end(chunk.sequence_id)
        # The planner makes another tuple when a sequence gets blocks, and else keeps the one; a plan that comes from
        # another rank has another each time.
        if self._block_tables[place] is not chunk.block_table and self._block_tables[place] != chunk.block_table:
            self._block_tables[place] = chunk.block_table
            self._tables[place, : len(chunk.block_table)] = chunk.block_table
        return place
