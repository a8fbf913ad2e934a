"""Computes steps on a GPU, one ahead of the planner: a step is launched, and nothing waits until its result is wanted.

What the host does for the next step happens while the device computes this one; the sampled tokens that the next step
begins with never leave the device before it.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from services.worker.cuda.decoder import DeviceDecoder, MostWork
from services.worker.cuda.graphs import StepGraphs
from services.worker.cuda.kv_cache import DeviceKvCache
from services.worker.cuda.logprobs import AskedLogprobs, Scoring
from services.worker.cuda.places import Places
from services.worker.cuda.ranks import DeviceRanks
from services.worker.cuda.sampling import Chosen, choose_others, needs_all_logits
from services.worker.cuda.shared_prefixes import SharedPrefix, shared_prefixes, tiles_of
from services.worker.cuda.step_inputs import (
    Numbers,
    StepInputs,
    StepLayout,
    StepSizes,
    chunk_tiles,
    fill,
    mixed_sizes,
    num_shared_pieces_for,
    views,
)
from services.worker.cuda.step_shapes import MOST_CHUNKS, NEVER, FilledUpTo, StepShape, StepShapes
from services.worker.cuda.transfer import HostCopy, pinned, to_device
from services.worker.engine.step_plan import ChunkResult, SequenceChunk, StepPlan, StepResult
from services.worker.kernels.prefill_attention import tile_tokens_for
from services.worker.kernels.shared_attention import members_of_piece

_STEPS_IN_FLIGHT = 3
"""Inputs that are kept: of the step that is filled, of one in flight, and of one whose copy may not be done."""
_OVERLAPPED_BELOW_ROWS = 512
"""Kernels of fewer rows begin before those in front have ended. Of more it harms, 4 % at 1,024: they take long."""


@dataclass(frozen=True, slots=True)
class LaunchedStep:
    """A step that the device computes, or has computed."""

    plan: StepPlan
    tokens: HostCopy
    sampled: AskedLogprobs
    scored: AskedLogprobs
    ranks_state: HostCopy | None
    moments: tuple[torch.cuda.Event, torch.cuda.Event] | None
    """When the device began it, and when all of it was done. None: the CPU pretends to be a device, and has done it."""

    def is_done(self) -> bool:
        """Whether the device has done it."""
        return self.moments is None or bool(self.moments[1].query())

    def wait(self) -> None:
        """Wait until the device has done it."""
        if self.moments:
            self.moments[1].synchronize()

    def result(self) -> StepResult:
        """Wait for the step and return what it sampled. Raises RanksLostError and RanksDisagreeError."""
        self.wait()
        took_ms = float(self.moments[0].elapsed_time(self.moments[1])) if self.moments else None
        if self.ranks_state:
            DeviceRanks.check(self.ranks_state.get())
        tokens = iter(self.tokens.get().tolist())
        chunks = [ChunkResult(None if chunk.sample_index is None else next(tokens)) for chunk in self.plan.chunks]
        for (index, _), logprobs in self.sampled.get().items():
            chunks[index] = chunks[index]._replace(logprobs=logprobs)
        # They are there in the order of their places.
        for index, scored in groupby(self.scored.get().items(), lambda item: item[0][0]):
            chunks[index] = chunks[index]._replace(scored=tuple(logprobs for _, logprobs in scored))
        return StepResult(tuple(chunks), took_ms)


class CudaRunner:
    """A model, or a rank's part, and its KV cache on a device: a `Runner` of the engine. The CPU can pretend to be one,
    in tests."""

    steps_ahead = 1

    def __init__(
        self,
        model: DeviceDecoder,
        cache: DeviceKvCache,
        most: MostWork,
        filled_up_to: FilledUpTo = NEVER,
        *,
        captures: bool = False,
    ) -> None:
        """`filled_up_to`: sizes of steps that are to be graphs. `captures`: not on a CPU; it fills steps up as well."""
        self._model = model
        self.cache = cache
        self._device = model.last_tokens.device
        self._layout = StepLayout(
            context_tokens=most.context_tokens,
            block_size_tokens=cache.block_size_tokens,
            has_fp8_cache=cache.is_fp8,
            may_be_dense=model.may_be_dense,
            is_batch_invariant=model.is_batch_invariant,
            tile_tokens=tile_tokens_for(model.config.num_heads, model.config.num_kv_heads),
        )
        self._places = Places(most.num_places, self._layout.table_blocks)
        largest = _most_numbers(most, self._layout)
        self._host = [pinned((largest,), torch.int32, self._device) for _ in range(_STEPS_IN_FLIGHT)]
        self._numbers = torch.zeros(largest, dtype=torch.int32, device=self._device)
        self._num_steps = 0
        config = model.config
        self._members_of_piece = members_of_piece(config.num_heads, config.num_kv_heads)
        # A window has left a prefix behind sooner or later.
        may_share = config.sliding_window is None and not model.is_batch_invariant
        self._shapes = StepShapes(filled_up_to, self._layout, may_share=may_share)
        self._graphs = StepGraphs(self._launch_filled, captures=captures)
        self._to_prepare = deque(self._shapes.usual())

    @torch.inference_mode()
    def rehearse(self) -> None:
        """Launch what graphs hold, by itself, once in each form that kernels have."""
        for shape in self._shapes.forms():
            self._launch_filled(shape)

    @property
    def may_prepare(self) -> bool:
        """Whether there may be something left to prepare."""
        return bool(self._to_prepare)

    @torch.inference_mode()
    def prepare(self) -> bool:
        """Capture the graph of another shape, while no step runs. False: all are there that are captured ahead."""
        while self._to_prepare:
            shape = self._to_prepare.popleft()
            if shape not in self._graphs:
                # What is launched before the capture has no tokens: it writes nothing, anywhere.
                self._give_inputs((), shape.sizes(self._layout, 0), None, ())
                self._graphs.launch(shape)
                if done := self._moment():
                    # Else the inputs of the next one might be written over these before they are copied.
                    done.synchronize()
                return True
        return False

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> LaunchedStep:
        """Begin a step."""
        begins = self._moment()
        self.cache.copy(plan.block_copies)
        chunks = plan.chunks
        num_decodes = self._layout.num_decodes(chunks)
        prefixes = self._prefixes(chunks[:num_decodes])
        shape = self._shapes.of(chunks, shares=bool(prefixes))
        if shape is None:
            sizes, exact_tiles = mixed_sizes(chunks, self._layout, shares=bool(prefixes))
            inputs = self._give_inputs(chunks, sizes, exact_tiles, prefixes)
            self._attend(inputs, sizes)
        else:
            sizes = shape.sizes(self._layout, sum(chunk.sample_index is not None for chunk in chunks))
            tiles = None
            if shape.has_chunks:
                tiles = chunk_tiles(chunks, num_decodes, self._layout.tile_tokens, leaves_dense=False)
            inputs = self._give_inputs(chunks, sizes, tiles, prefixes)
            self._graphs.launch(shape)
        if shape is None or shape.has_chunks:
            # Of exactly as many rows as there are samples: a dozen kernels, launched while the device computes all that
            # is in front of them.
            self._choose(inputs, sizes)
        return self._read(plan, inputs, sizes, begins)

    def _prefixes(self, decodes: Sequence[SequenceChunk]) -> list[SharedPrefix]:
        """What the decodes of a step share, by tiles of the kernel."""
        if not self._shapes.may_share(len(decodes)):
            return []
        groups = shared_prefixes(
            [chunk.block_table for chunk in decodes],
            [chunk.first_position for chunk in decodes],
            self.cache.block_size_tokens,
        )
        return tiles_of(groups, self._members_of_piece, num_shared_pieces_for(len(decodes)))

    def _launch_filled(self, shape: StepShape) -> None:
        """What a graph holds: a step of decodes whole, of one with prompts all but the choice of tokens."""
        sizes = shape.sizes(self._layout, 0)
        inputs = views(self._numbers, sizes)
        self._attend(inputs, sizes)
        if not shape.has_chunks:
            self._choose(inputs, sizes)

    def _attend(self, inputs: StepInputs[Tensor], sizes: StepSizes) -> None:
        self._model.attend(inputs, sizes, self.cache, pdl=self._overlaps(sizes.num_rows))

    def _choose(self, inputs: StepInputs[Tensor], sizes: StepSizes) -> None:
        self._model.choose(inputs, sizes, pdl=self._overlaps(sizes.num_samples))

    def _overlaps(self, num_rows: int) -> bool:
        """Whether kernels of so many rows begin before those in front have ended."""
        return self._device.type == "cuda" and num_rows < _OVERLAPPED_BELOW_ROWS

    def _give_inputs(
        self,
        chunks: Sequence[SequenceChunk],
        sizes: StepSizes,
        tiles: Numbers | None,
        prefixes: Sequence[SharedPrefix],
    ) -> StepInputs[Tensor]:
        host = self._host[self._num_steps % _STEPS_IN_FLIGHT]
        self._num_steps += 1
        places, tables = self._places.of(chunks)
        fill(views(host.numpy(), sizes), chunks, places, tables, tiles, prefixes, self._layout)
        count = sizes.num_numbers
        self._numbers[:count].copy_(host[:count], non_blocking=True)
        return views(self._numbers, sizes)

    def _read(
        self, plan: StepPlan, inputs: StepInputs[Tensor], sizes: StepSizes, begins: torch.cuda.Event | None
    ) -> LaunchedStep:
        """Choose what is not the likeliest token, and send results to the host."""
        model = self._model
        sampling = [chunk for chunk in plan.chunks if chunk.sample_index is not None]
        logits = self._logits_of(sampling, sizes.num_samples)
        chosen = Chosen(logits, model.choices, inputs.sample_places, model.tokens, model.last_tokens)
        choose_others(chosen, sampling)
        scoring = Scoring(self._device)
        sampled = scoring.sampled(plan.chunks, logits, model.tokens)
        scored = scoring.given(plan.chunks, model.normed, model.logits)
        tokens = HostCopy(model.tokens[: len(sampling)])
        ranks_state = HostCopy(model.ranks.state) if model.ranks else None
        done = self._moment()
        moments = (begins, done) if begins and done else None
        return LaunchedStep(plan, tokens, sampled, scored, ranks_state, moments)

    def _moment(self) -> torch.cuda.Event | None:
        """When the device has done all that was launched so far."""
        if self._device.type != "cuda":
            return None
        moment = torch.cuda.Event(enable_timing=True)
        moment.record()
        return moment

    def _logits_of(self, sampling: Sequence[SequenceChunk], num_samples: int) -> Tensor:
        """Logits of the step's samples; of several ranks, whole rows where more than the likeliest token is wanted."""
        logits, ranks = self._model.logits_of(num_samples), self._model.ranks
        if ranks is None:
            return logits
        rows = [row for row, chunk in enumerate(sampling) if needs_all_logits(chunk)]
        if not rows:
            return logits
        on_device = to_device(torch.tensor(rows), self._device)
        of_rows = ranks.whole(logits[on_device])
        return logits.new_empty((num_samples, of_rows.shape[1])).index_copy_(0, on_device, of_rows)


def _most_numbers(most: MostWork, layout: StepLayout) -> int:
    """Length of the inputs of any step."""
    sequences = most.num_sequences
    return StepSizes(
        num_rows=most.num_rows,
        num_decodes=sequences,
        num_chunks=sequences + MOST_CHUNKS,
        num_samples=sequences,
        num_pieces=layout.num_pieces(sequences),
        num_tiles=most.num_rows + MOST_CHUNKS,
        table_blocks=layout.table_blocks,
        num_shared_pieces=num_shared_pieces_for(sequences),
    ).num_numbers
