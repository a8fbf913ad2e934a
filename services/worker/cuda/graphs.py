"""Steps, or what of them has a fixed size, as CUDA graphs: a few hundred launches become one."""

from collections.abc import Callable

import torch

from services.worker.cuda.step_shapes import StepShape


class StepGraphs:
    """Graphs by shape, in one pool of memory. They read and write at the addresses that the captured calls did."""

    def __init__(self, launch: Callable[[StepShape], None], *, captures: bool) -> None:
        """`launch` launches kernel by kernel; it must neither allocate nor wait. `captures`: False: there is no
        graph, and every step is launched so."""
        self._launch = launch
        self._captures = captures
        self._graphs: dict[StepShape, torch.cuda.CUDAGraph] = {}
        self._stream = torch.cuda.Stream() if captures else None
        self._pool = torch.cuda.graph_pool_handle() if captures else None

    def __contains__(self, shape: StepShape) -> bool:
        return shape in self._graphs

    def launch(self, shape: StepShape) -> None:
        """Launch a step: the first one of a shape kernel by kernel, whose graph is captured while the device computes.

        So whatever a library allocates or compiles at its first call is there before a capture, which may hold neither.
        """
        if graph := self._graphs.get(shape):
            graph.replay()
            return
        self._launch(shape)
        if self._captures:
            self._graphs[shape] = self._captured(shape)

    def _captured(self, shape: StepShape) -> torch.cuda.CUDAGraph:
        # Not by torch's context manager: it waits for the device. Nothing is executed, so what runs is not disturbed.
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                self._launch(shape)
            finally:
                graph.capture_end()
        return graph
