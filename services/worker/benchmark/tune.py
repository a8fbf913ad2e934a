"""Times the kernels' possible tunings on a device: the tables in `cuda/matrix.py` and `kernels/decode_attention.py`.

    python -m services.worker.benchmark.tune --out tuning.jsonl

A line for each, in us a call: calls follow each other in a graph, as in a step, with operands that no cache still
holds. Prints the best of each shape, and cuBLAS beside it.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from triton.runtime.errors import OutOfResources

from services.worker.cuda.step_inputs import LEAST_PIECE_TOKENS
from services.worker.kernels.decode_attention import (
    DecodeBatch,
    DecodeTuning,
    PieceResults,
    cut_contexts,
    decode_attention,
    even_length,
    piece_results,
)
from services.worker.kernels.gemv import gemv
from services.worker.kernels.paged_kv import PagedLayer
from services.worker.kernels.round_rows import round_rows_into
from services.worker.kernels.rows import FP8, Rows, Scaled
from services.worker.kernels.small_product import (
    MOST_ROWS,
    ProductTuning,
    fits,
    small_product,
    small_product_swiglu,
)
from services.worker.kernels.swiglu import swiglu
from services.worker.kernels.tile_product import product_swiglu

MATRICES = {
    "qkv": (6144, 4096),
    "o": (4096, 4096),
    "gate_up": (28672, 4096),
    "down": (4096, 14336),
    "head": (128256, 4096),
}
HEADS, KV_HEADS, HEAD_DIM, BLOCK = 32, 8, 128, 64
TUNINGS = [
    ProductTuning(outputs, num_bytes, stages, num_splits=splits)
    for outputs, num_bytes, stages, splits in product((64, 128), (256, 512), (3, 4, 6, 8), (1, 2))
]
TUNINGS_OF_MORE_ROWS = [
    ProductTuning(outputs, num_bytes, stages, warps, splits)
    for (outputs, num_bytes, stages, warps), splits in product(
        (
            *((64, 128, 4, 4), (64, 128, 6, 4), (64, 128, 8, 4), (64, 128, 5, 8), (64, 256, 3, 4), (64, 256, 4, 4)),
            *((128, 128, 3, 4), (128, 128, 4, 4), (128, 128, 5, 4), (128, 128, 4, 8), (128, 128, 5, 8)),
            *((128, 256, 3, 4), (128, 256, 4, 4), (128, 256, 3, 8), (256, 128, 3, 8), (256, 128, 4, 8)),
        ),
        (1, 2),
    )
]
"""Of products of few rows: to 64, and above."""
MORE_PIECES = (0, 8, 16, 24, 32, 48, 64, 128)
"""Than sequences, that contexts are cut into at most."""
ROTATED_BYTES = 200 << 20
"""More than three times the second-level cache."""
Call = Callable[[int], object]
"""Calls a kernel on the operands of a number."""


def us_a_call(call: Call, num_operands: int) -> float:
    """Median over replays of a graph of calls."""
    calls = max(8, 2 * num_operands)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call(0)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for number in range(calls):
            call(number % num_operands)
    times = []
    for _ in range(7):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1000 * begin.elapsed_time(end) / calls)
    return float(statistics.median(times))


def products(rows_of: Sequence[int]) -> Iterator[dict[str, object]]:
    """Few rows times each of a layer's matrices."""
    for dtype, (name, (outputs, inputs)) in product((torch.bfloat16, FP8), MATRICES.items()):
        if dtype == FP8 and name == "head":
            continue
        count = max(2, ROTATED_BYTES // (outputs * inputs * dtype.itemsize))
        weights = [torch.randn((outputs, inputs), device="cuda").to(dtype) for _ in range(count)]
        for num_rows in rows_of:
            shape = {"kernel": "product", "matrix": name, "dtype": str(dtype), "rows": num_rows}
            rows = _rows(num_rows, inputs, dtype)
            yield {**shape, "how": "cuBLAS", "us": us_a_call(_cublas(rows, weights), count)}
            if num_rows == 1:
                plain = rows.to(torch.bfloat16)
                yield {**shape, "how": "gemv", "us": us_a_call(_gemv(plain, weights), count)}
            for tuning in TUNINGS if num_rows <= 64 else TUNINGS_OF_MORE_ROWS:
                if not fits(num_rows, weights[0], tuning) or (tuning.num_splits > 1 and name in ("gate_up", "head")):
                    continue
                try:
                    us = us_a_call(_small(rows, weights, tuning), count)
                except OutOfResources:
                    continue
                yield {**shape, "how": str(tuning), "us": us}


def activations(rows_of: Sequence[int]) -> Iterator[dict[str, object]]:
    """Rows times a gate's and an up's matrix, with SwiGLU and, of fp8, rounding behind: together and apart."""
    for dtype, num_rows in product((torch.bfloat16, FP8), rows_of):
        shape = {"kernel": "activation", "matrix": "gate_up", "dtype": str(dtype), "rows": num_rows}
        for how, call in _ways_to_activate(dtype, num_rows):
            try:
                yield {**shape, "how": how, "us": us_a_call(call, 1)}
            except OutOfResources:
                continue


def _ways_to_activate(dtype: torch.dtype, num_rows: int) -> Iterator[tuple[str, Call]]:
    outputs, inputs = MATRICES["gate_up"]
    x, w = _rows(num_rows, inputs, dtype), torch.randn((outputs, inputs), device="cuda").to(dtype)
    gate_up = torch.empty((num_rows, outputs), dtype=torch.bfloat16, device="cuda")
    plain = Rows(torch.empty((num_rows, outputs // 2), dtype=torch.bfloat16, device="cuda"))
    one, row_scales, channel_scales = (torch.ones(size, device="cuda") for size in ((), num_rows, outputs))
    rounded = Rows(torch.empty_like(plain.values, dtype=FP8), row_scales)

    def library(_: int) -> None:
        torch.mm(x, w.T, out=gate_up)
        swiglu(Scaled(gate_up), plain)

    def tiles(_: int) -> None:
        product_swiglu(x, w, plain.values)

    def few(tuning: ProductTuning) -> Call:
        def call(_: int) -> None:
            if dtype == FP8:
                small_product_swiglu(Rows(x, row_scales), w, channel_scales, plain.values, tuning, pdl=True)
                round_rows_into(plain.values, rounded, pdl=True)
            else:
                small_product_swiglu(Rows(x), w, None, plain.values, tuning, pdl=True)

        return call

    def scaled(row: Tensor, channel: Tensor, product: Scaled) -> Call:
        def call(_: int) -> None:
            torch._scaled_mm(x, w.T, row, channel, out_dtype=gate_up.dtype, use_fast_accum=True, out=gate_up)
            swiglu(product, rounded)

        return call

    if dtype == FP8:
        yield "cuBLAS", scaled(one, one, Scaled(gate_up, row_scales, channel_scales))
        yield "cuBLAS with scales", scaled(row_scales[:, None], channel_scales[None, :], Scaled(gate_up))
    else:
        yield "cuBLAS", library
        yield "tiles", tiles
    for tuning in TUNINGS_OF_MORE_ROWS if num_rows <= MOST_ROWS else ():
        if tuning.num_splits == 1 and tuning.outputs >= 128:
            yield f"few rows, {tuning}", few(tuning)


def _rows(num_rows: int, size: int, dtype: torch.dtype) -> Tensor:
    """Rows with others behind them in memory, as in a step's room."""
    return torch.randn((num_rows + MOST_ROWS, size), device="cuda").to(dtype)[:num_rows]


def _cublas(rows: Tensor, weights: Sequence[Tensor]) -> Call:
    out = torch.empty((len(rows), len(weights[0])), dtype=torch.bfloat16, device="cuda")
    one = torch.ones((), device="cuda")
    if rows.dtype == FP8:
        return lambda number: torch._scaled_mm(
            rows, weights[number].T, one, one, out_dtype=out.dtype, use_fast_accum=True, out=out
        )
    return lambda number: torch.mm(rows, weights[number].T, out=out)


def _gemv(row: Tensor, weights: Sequence[Tensor]) -> Call:
    out = torch.empty((1, len(weights[0])), dtype=torch.bfloat16, device="cuda")
    scales = torch.ones(len(weights[0]), device="cuda") if weights[0].dtype == FP8 else None
    return lambda number: gemv(row, weights[number], scales, out, pdl=True)


def _small(rows: Tensor, weights: Sequence[Tensor], tuning: ProductTuning) -> Call:
    dtype = torch.bfloat16 if tuning.num_splits == 1 else torch.float32
    out = torch.empty((tuning.num_splits, len(rows), len(weights[0])), dtype=dtype, device="cuda")
    return lambda number: small_product(rows, weights[number], out, tuning, pdl=True)


def decodes(rows_of: Sequence[int]) -> Iterator[dict[str, object]]:
    """Attention of decodes, by number of sequences: of contexts of one length, and of some as long as a chat's."""
    generator = np.random.default_rng(0)
    for dtype, num_rows in product((torch.bfloat16, FP8), rows_of):
        prompts = np.clip(generator.lognormal(math.log(512), 1.0, num_rows), 32, 4096)
        chats = (prompts + generator.uniform(30, 900, num_rows)).astype(np.int32)
        for name, contexts in (("800 each", np.full(num_rows, 800, dtype=np.int32)), ("a chat's", chats)):
            yield from _decodes_of(dtype, name, contexts)


def _decodes_of(dtype: torch.dtype, name: str, contexts: NDArray[np.int32]) -> Iterator[dict[str, object]]:
    num_rows, counts = len(contexts), -(-contexts // BLOCK)
    num_blocks = int(counts.sum())
    count = max(2, -(-ROTATED_BYTES // (num_blocks * 2 * KV_HEADS * BLOCK * HEAD_DIM * dtype.itemsize)))
    layers = [
        PagedLayer(torch.randn((num_blocks, 2, KV_HEADS, BLOCK, HEAD_DIM), device="cuda").to(dtype))
        for _ in range(count)
    ]
    tables = np.zeros((num_rows, counts.max()), dtype=np.int32)
    tables[np.arange(counts.max()) < counts[:, None]] = np.random.default_rng(1).permutation(num_blocks)
    queries = torch.randn((num_rows, HEADS, HEAD_DIM), device="cuda").to(torch.bfloat16)
    bytes_read = int(contexts.sum()) * 2 * KV_HEADS * HEAD_DIM * dtype.itemsize
    lengths = {even_length(contexts, num_rows + more, BLOCK, LEAST_PIECE_TOKENS): more for more in MORE_PIECES}
    for length, more in lengths.items():
        cut, of_row = cut_contexts(np.zeros_like(contexts), contexts, length)
        splits = np.pad(of_row, ((0, 0), (0, 2)))
        batch = DecodeBatch(*(torch.from_numpy(part).cuda() for part in (cut, splits, tables)))
        room = piece_results(len(cut), num_rows, HEADS, KV_HEADS, HEAD_DIM, queries.device)
        for tile, warps, stages in product((32, 64), (2, 4), (3, 5, 7)):
            tuning = DecodeTuning(tile, warps, stages, more_pieces=more)
            us = us_a_call(_decode(queries, layers, batch, room, tuning), count)
            yield {
                "kernel": "decode_attention",
                "dtype": str(dtype),
                "rows": num_rows,
                "context": name,
                "pieces": len(cut),
                "how": str(tuning),
                "us": us,
                "tb_per_s": bytes_read / us / 1e6,
            }


def _decode(
    queries: Tensor, layers: Sequence[PagedLayer], batch: DecodeBatch, room: PieceResults, tuning: DecodeTuning
) -> Call:
    out = torch.empty_like(queries)
    return lambda number: decode_attention(queries, layers[number], batch, room, out, pdl=True, tuning=tuning)


def main(arguments: Sequence[str] | None = None) -> int:
    """Time all of it; return the process's exit status."""
    parser = argparse.ArgumentParser(prog="python -m services.worker.benchmark.tune", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="every tuning's time")
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 2, 16, 32, 64, 96, 128, 192], help="of products")
    parser.add_argument(
        "--many-rows", type=int, nargs="*", default=[32, 96, 128, 192, 256, 1024, 2048, 8192], help="of activations"
    )
    parser.add_argument(
        "--decodes",
        type=int,
        nargs="*",
        default=[1, 4, 8, 16, 24, 32, 48, 64, 80, 128, 192, 256, 512],
        help="sequences",
    )
    parser.add_argument("--only", choices=("products", "activations", "decodes"), help="one of the three")
    given = parser.parse_args(arguments)
    lines: list[dict[str, object]] = []
    with given.out.open("w", encoding="utf-8") as out:
        for line in (
            *_chosen(given.only, "products", lambda: products(given.rows)),
            *_chosen(given.only, "activations", lambda: activations(given.many_rows)),
            *_chosen(given.only, "decodes", lambda: decodes(given.decodes)),
        ):
            lines.append(line)
            out.write(json.dumps(line) + "\n")
    best: dict[tuple[object, ...], dict[str, object]] = {}
    for line in lines:
        key = tuple(line.get(name) for name in ("kernel", "matrix", "dtype", "rows", "context"))
        if key not in best or line["us"] < best[key]["us"]:  # type: ignore[operator]
            best[key] = line
    for line in (*best.values(), *(line for line in lines if line["how"] in ("cuBLAS", "gemv"))):
        print(json.dumps(line))
    return 0


def _chosen(
    only: str | None, name: str, lines: Callable[[], Iterator[dict[str, object]]]
) -> Iterator[dict[str, object]]:
    return iter(()) if only not in (None, name) else lines()


if __name__ == "__main__":
    sys.exit(main())
