"""A forward pass of a whole decoder: what a token's row becomes depends on its own sequence alone, to the last bit.

Few rows are computed by all threads together, part by part; of many, each thread takes some through all parts. Both are
here, with queries wider than the hidden states, so that a row taken from the wrong place shows.
"""

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from services.worker.engine.block_pool import BlockId
from services.worker.engine.sequence import SamplingParameters, SequenceId
from services.worker.engine.step_plan import SequenceChunk, StepPlan
from services.worker.runner.batch import make_batch
from services.worker.runner.kv_cache import PagedKvCache
from services.worker.runner.matrix import PackedMatrix, pack_float32, pack_int8
from services.worker.runner.models.decoder import Decoder
from services.worker.runner.models.decoder_weights import DecoderConfig, DecoderLayerWeights, DecoderWeights
from services.worker.runner.rotary_frequencies import rotary_frequencies
from tests.unit.instruction_sets import instruction_set

__all__ = ["instruction_set"]

CONFIG = DecoderConfig(
    num_layers=3,
    hidden_size=64,
    intermediate_size=192,
    num_heads=6,
    num_kv_heads=2,
    head_dim=32,
    vocabulary_size=100,
    context_tokens=1024,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
)
BLOCK_SIZE = 16
PROMPT = [number * 7 % 100 for number in range(500)]

Pack = Callable[[Tensor, Tensor | None], PackedMatrix]


@pytest.fixture(params=[pack_float32, pack_int8])
def pack(request: pytest.FixtureRequest) -> Pack:
    found: Pack = request.param
    return found


@pytest.fixture
def given_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def a_decoder(pack: Pack) -> Decoder:
    noise = torch.Generator().manual_seed(0)

    def weights(*shape: int) -> Tensor:
        return torch.randn(shape, generator=noise) / math.sqrt(shape[-1])

    def matrix(num_outputs: int, num_inputs: int) -> PackedMatrix:
        return pack(weights(num_outputs, num_inputs), weights(num_outputs))

    sizes = CONFIG.hidden_size, CONFIG.intermediate_size
    layers = tuple(
        DecoderLayerWeights(
            attention_norm=1 + weights(sizes[0]),
            qkv_proj=matrix(CONFIG.q_size + 2 * CONFIG.kv_size, sizes[0]),
            qk_norm=1 + weights(CONFIG.num_heads + CONFIG.num_kv_heads, CONFIG.head_dim),
            o_proj=matrix(sizes[0], CONFIG.q_size),
            mlp_norm=1 + weights(sizes[0]),
            gate_up_proj=matrix(2 * sizes[1], sizes[0]),
            down_proj=matrix(sizes[0], sizes[1]),
        )
        for _ in range(CONFIG.num_layers)
    )
    return Decoder(
        CONFIG,
        DecoderWeights(
            embedding=weights(CONFIG.vocabulary_size, sizes[0]),
            layers=layers,
            norm=1 + weights(sizes[0]),
            lm_head=matrix(CONFIG.vocabulary_size, sizes[0]),
            rotary_frequencies=rotary_frequencies(CONFIG.head_dim, CONFIG.rope_theta),
        ),
    )


def a_chunk(number: int, first: int, end: int) -> SequenceChunk:
    """Tokens of PROMPT, whose every row is wanted; each sequence has blocks of its own."""
    blocks = -(-len(PROMPT) // BLOCK_SIZE)
    table = tuple(BlockId(block) for block in range(number * blocks, (number + 1) * blocks))
    tokens = tuple(PROMPT[first:end])
    return SequenceChunk(
        SequenceId(number), tokens, first, table, SamplingParameters(), sample_index=0,
        scored_token_ids=tokens[1:],
    )  # fmt: skip


def hidden_states(decoder: Decoder, steps: list[list[SequenceChunk]]) -> list[Tensor]:
    """Of every row, step by step."""
    cache = PagedKvCache(CONFIG, num_blocks=3 * -(-len(PROMPT) // BLOCK_SIZE), block_size_tokens=BLOCK_SIZE)
    return [
        decoder.forward(make_batch(StepPlan(number, tuple(chunks)), cache), cache)
        for number, chunks in enumerate(steps, 1)
    ]


@pytest.mark.parametrize("chunk_tokens", [1, 29, 150])
def test_a_prompt_in_one_step_has_the_bits_that_it_has_in_pieces(pack: Pack, chunk_tokens: int) -> None:
    decoder = a_decoder(pack)
    (whole,) = hidden_states(decoder, [[a_chunk(0, 0, len(PROMPT))]])
    starts = range(0, len(PROMPT), chunk_tokens)
    pieces = hidden_states(decoder, [[a_chunk(0, start, min(start + chunk_tokens, len(PROMPT)))] for start in starts])
    assert torch.equal(torch.cat(pieces), whole)


def test_a_prompt_has_the_same_bits_beside_other_rows(pack: Pack) -> None:
    decoder = a_decoder(pack)
    (alone,) = hidden_states(decoder, [[a_chunk(1, 0, 90)]])
    _, beside = hidden_states(
        decoder, [[a_chunk(0, 0, 10)], [a_chunk(0, 10, 11), a_chunk(1, 0, 90), a_chunk(2, 0, 333)]]
    )
    assert torch.equal(beside[1:91], alone)


@pytest.mark.usefixtures("given_threads")
def test_threads_do_not_change_a_bit_of_a_pass(pack: Pack) -> None:
    decoder = a_decoder(pack)
    steps = [[a_chunk(0, 0, 450)], [a_chunk(0, 450, 500)]]
    before = hidden_states(decoder, steps)
    for num_threads in (1, 3, 5):
        torch.set_num_threads(num_threads)
        assert all(map(torch.equal, hidden_states(decoder, steps), before))
