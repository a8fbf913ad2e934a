"""What steps are filled up to, so that a few graphs serve them all: rows, and how many of them are decodes.

What is behind a step's own rows, tiles and pieces is computed for nothing: rows cost their share of the products, tiles
and pieces only a program that leaves at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from services.worker.cuda.step_inputs import StepLayout, StepSizes, num_shared_pieces_for
from services.worker.engine.limits import least_size
from services.worker.engine.step_plan import SequenceChunk
from services.worker.kernels.small_product import MOST_ROWS as MOST_ROWS_OF_FEW
from services.worker.kernels.small_product import row_blocks

MOST_CHUNKS = 16
"""Prompts, or parts of prompts, in a step that is filled up."""
MOST_ROWS = 2304
"""Of a step with prompts that is filled up: more take the device longer than the host takes to launch them."""
_DECODES = (
    *range(1, 32), *range(32, 64, 2), *range(64, 128, 4), *range(128, 264, 8),
    264, 280, 296, 312, 328, 344, 360, 376, 384, 408, 432, 456, 472, 496, 512,
)  # fmt: skip
"""Sizes of steps of decodes alone, by what cuBLAS takes for multiples of 8 in bf16 and fp8 (docs/gpu-kernels.md): a
step of 260 rows takes it 0.7 to 0.8 ms more than one of 256, and one of 448 3 ms more than one of 456."""
_CHUNK_ROWS = (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 384, 480, 512, 640, 768, 896, 1024)
"""Sizes of steps with prompts, and from there on multiples of 128. By time, not by rows: cuBLAS takes longer for some
than for more. An 8B model in bf16 takes 11.3 ms for 416, 14.6 for 448 and 11.2 for 480 rows, 17.3 for 576 and 14.4 for
640."""
_DECODE_CAPS = (64,)
"""Decodes beside prompts that there is room for, if not for all. Room for 256 beside 12 costs 0.3 ms a step, for 64
less than 0.1: a program for nothing takes its microsecond too."""
_LEAST_SHARING_DECODES = 16
"""Of fewer, attention is a small part of a step."""


@dataclass(frozen=True, slots=True)
class FilledUpTo:
    """Numbers of rows, ascending, that steps are filled up to; a step of more is computed as it is."""

    decodes: tuple[int, ...] = ()
    """Of steps of decodes alone."""
    chunks: tuple[int, ...] = ()
    """Of others."""


NEVER = FilledUpTo()


@dataclass(frozen=True, slots=True)
class StepShape:
    """What a step is filled up to."""

    num_rows: int
    num_decodes: int
    """Rows in front that may be decodes."""
    has_chunks: bool = False
    """Whether there is room for prompts. If not, all rows are decodes, and a token is chosen after each."""
    shares: bool = False
    """Whether decodes may have prefixes in common."""

    def sizes(self, layout: StepLayout, num_samples: int) -> StepSizes:
        """What the step's inputs have room for. `num_samples`: with prompts exactly the step's."""
        return StepSizes(
            num_rows=self.num_rows,
            num_decodes=self.num_decodes,
            num_chunks=self.num_decodes + (MOST_CHUNKS if self.has_chunks else 0),
            num_samples=num_samples if self.has_chunks else self.num_rows,
            num_pieces=layout.num_pieces(self.num_decodes),
            # Each prompt has one tile at most that is not full.
            num_tiles=self.num_rows // layout.tile_tokens + MOST_CHUNKS if self.has_chunks else 0,
            table_blocks=layout.table_blocks,
            num_shared_pieces=num_shared_pieces_for(self.num_decodes) if self.shares else 0,
        )


def decode_sizes(most: int) -> tuple[int, ...]:
    """Return numbers of decodes up to `most`: of any other number, at most 6 % of the rows are computed for nothing."""
    sizes = list(_DECODES)
    while sizes[-1] < most:
        # A sixteenth of the power of two below.
        sizes.append(sizes[-1] + (1 << sizes[-1].bit_length() - 5))
    return (*(size for size in sizes if size < most), most)


def chunk_sizes(most: int) -> tuple[int, ...]:
    """Return numbers of rows, up to `most`, that steps with prompts are filled up to."""
    sizes = (*_CHUNK_ROWS, *range(_CHUNK_ROWS[-1] + 128, MOST_ROWS + 1, 128))
    return (*(size for size in sizes if size < most), *((most,) if most <= MOST_ROWS else ()))


class StepShapes:
    """The shapes of a runner's steps."""

    def __init__(self, filled_up_to: FilledUpTo, layout: StepLayout, *, may_share: bool) -> None:
        """`may_share`: whether what sequences have in common may be attended once."""
        decodes = self._decodes = filled_up_to.decodes
        self._chunks = filled_up_to.chunks
        self._layout = layout
        self._may_share = may_share
        self._caps = sorted({min(cap, decodes[-1]) for cap in (*_DECODE_CAPS, decodes[-1])}) if decodes else []

    def may_share(self, num_decodes: int) -> bool:
        """Whether prefixes of so many decodes are worth to be looked for."""
        return self._may_share and num_decodes >= _LEAST_SHARING_DECODES

    def of(self, chunks: Sequence[SequenceChunk], *, shares: bool) -> StepShape | None:
        """Return what a step is filled up to; None: it is computed as it is."""
        num_decodes = self._layout.num_decodes(chunks)
        is_scored = any(chunk.scored_token_ids for chunk in chunks)
        if num_decodes == len(chunks) and not is_scored and all(chunk.sample_index is not None for chunk in chunks):
            num_rows = least_size(self._decodes, num_decodes)
            return StepShape(num_rows, num_rows, shares=shares) if num_rows else None
        num_rows = least_size(self._chunks, sum(len(chunk.token_ids) for chunk in chunks))
        cap = least_size(self._caps, num_decodes)
        if num_rows is None or cap is None or is_scored or len(chunks) - num_decodes > MOST_CHUNKS:
            return None
        return StepShape(num_rows, min(cap, num_rows), has_chunks=True, shares=shares)

    def usual(self) -> list[StepShape]:
        """Return shapes of all sizes, those first that a growing load comes to first; of steps with prompts none that
        share."""
        alone = [StepShape(size, size) for size in self._decodes]
        chunks = {StepShape(size, min(cap, size), has_chunks=True) for cap in self._caps for size in self._chunks}
        sharing = [StepShape(size, size, shares=True) for size in self._decodes if self.may_share(size)]
        return sorted([*alone, *chunks], key=lambda shape: (shape.num_decodes, shape.num_rows)) + sharing

    def forms(self) -> list[StepShape]:
        """Return shapes that together have all forms of kernels: those are chosen by powers of two of their rows, and
        of few rows by their blocks and by thirty-twos (`cuda/matrix.py`)."""
        shapes = [StepShape(size, size) for size in _first_of_forms(self._decodes)]
        shapes += [
            StepShape(size, min(self._caps[-1], size), has_chunks=True) for size in _first_of_forms(self._chunks)
        ]
        return [*shapes, *(replace(shape, shares=True) for shape in shapes if self.may_share(shape.num_decodes))]


def _first_of_forms(sizes: Sequence[int]) -> list[int]:
    return [size for below, size in pairwise([0, *sizes]) if _form(below) != _form(size)]


def _form(num_rows: int) -> tuple[object, ...]:
    if num_rows > MOST_ROWS_OF_FEW:
        return (num_rows.bit_length(),)
    # By blocks too: 16 rows fill theirs, and 17 to 31, as long in bits, are of the next one.
    return num_rows.bit_length(), row_blocks(num_rows), (num_rows + 31) // 32
