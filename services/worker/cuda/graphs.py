"""Steps of decodes as CUDA graphs, one for each of some batch sizes: a few hundred launches become one."""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch

_WARM_UPS = 2
"""Before a capture: what a library allocates or compiles at its first call may not happen in one."""


def graph_sizes(most: int) -> list[int]:
    """Return batch sizes up to `most`: of any other size, at most 6 % of the rows are computed for nothing."""
    sizes = [1]
    while sizes[-1] < most:
        # The next one below it by a sixteenth: from a size on, as many as that.
        sizes.append(min(most, sizes[-1] + max(1, sizes[-1] // 16)))
    return sizes


class DecodeGraphs:
    """Graphs by batch size, in one pool of memory. They read and write at the addresses that the captured calls did."""

    def __init__(self, sizes: Sequence[int], launch: Callable[[int, bool], None], shares_from: int | None) -> None:
        """`launch` launches a step of so many decodes; it must neither allocate nor wait.

        `shares_from`: the least size that there is a second graph of, for steps in which some share a prefix, so that
        the others need no kernel for it. None: there is none.
        """
        self._sizes = sorted(sizes)
        self._launch = launch
        self._shares_from = shares_from
        self._graphs: dict[tuple[int, bool], torch.cuda.CUDAGraph] = {}

    def size_for(self, num_decodes: int) -> int | None:
        """Return the least size that holds so many decodes; None: none does."""
        index = bisect_left(self._sizes, num_decodes)
        return self._sizes[index] if index < len(self._sizes) else None

    def forms(self) -> list[tuple[int, bool]]:
        """Return sizes, and whether prefixes are shared, that together have all forms of kernels: those are chosen by
        powers of two of their rows."""
        sizes = [size for below, size in pairwise([0, *self._sizes]) if below.bit_length() != size.bit_length()]
        return [(size, shares) for size in sizes for shares in self._kinds(size)]

    def _kinds(self, size: int) -> tuple[bool, ...]:
        may_share = self._shares_from is not None and size >= self._shares_from
        return (False, True) if may_share else (False,)

    @torch.inference_mode()
    def capture_all(self) -> None:
        """Capture all sizes, the largest first: the others fit into its memory."""
        if not self._sizes:
            return
        pool = None
        stream = torch.cuda.Stream()
        for size in reversed(self._sizes):
            for shares in self._kinds(size):
                with torch.cuda.stream(stream):
                    for _ in range(_WARM_UPS if size == self._sizes[-1] or size == 1 else 1):
                        self._launch(size, shares)
                stream.synchronize()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=pool, stream=stream):
                    self._launch(size, shares)
                pool = graph.pool()
                self._graphs[size, shares] = graph

    def replay(self, size: int, *, shares: bool) -> None:
        """Launch a step of a size in `sizes`."""
        self._graphs[size, shares].replay()
