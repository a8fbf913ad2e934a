"""One measurement, from its settings to its report."""

import time
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path

from services.common.tls.files import Tls
from shoal._gateways import CallMetadata
from shoal.bench.answer import Answer
from shoal.bench.ask import Ask, LoadError, read_asks
from shoal.bench.load import closed_loop, open_loop
from shoal.bench.openai_target import OpenAITarget
from shoal.bench.plot import write_plot
from shoal.bench.report import as_text, write_json
from shoal.bench.shoal_target import ShoalTarget
from shoal.bench.summary import Objective, latencies_s, summarize
from shoal.bench.target import Target
from shoal.bench.workloads import WARM_UP_SEED, WORKLOADS, asks_of, at_poisson_times


@dataclass(frozen=True, slots=True)
class Settings:
    """What to measure, and how. The same names as the flags of `shoal bench serve`."""

    gateways: tuple[str, ...] = ()
    url: str = ""
    """Instead of gateways: a server with OpenAI's API."""
    model: str = ""
    workload: str = "mixed"
    input: Path | None = None
    """Instead of a workload: a file of requests."""
    requests: int | None = None
    seed: int = 0
    vocab: int | None = None
    first_token: int = 0
    rate: float | None = None
    """Mean arrivals a second."""
    concurrency: int | None = None
    warmup: int = 1
    timeout_s: float = 600.0
    slo_ttft_ms: float | None = None
    slo_itl_ms: float | None = None
    tls: Tls | None = None
    """How to call gateways, None: in plain; or whom to trust at a URL, None: well-known authorities."""
    metadata: CallMetadata = ()
    """Goes with each call, in HTTP as headers: the API key."""
    json: Path | None = None
    plot: Path | None = None


async def serve(settings: Settings) -> int:
    """Measure, print and write; return how many requests failed.

    Raises TargetError if the server cannot be asked at all, LoadError, ShoalError.
    """
    async with AsyncExitStack() as resources:
        target, vocabulary_tokens = await _target(settings, resources)
        warm_up, asks = _asks(settings, vocabulary_tokens)
        for ask in warm_up:
            await target.ask(ask, lambda: None)
        answers = await _load(settings, target, asks)
    objective = Objective(settings.slo_ttft_ms, settings.slo_itl_ms)
    summary = summarize(answers, objective)
    title = f"{target.name}: {_load_name(settings)}"
    print(as_text(title, summary, objective, answers))
    if settings.json:
        write_json(settings.json, target.name, _told(settings), summary, answers)
    if settings.plot:
        write_plot(settings.plot, title, latencies_s(answers), objective)
    return sum(summary.errors.values())


def _told(settings: Settings) -> dict[str, object]:
    """The settings for a file that others may read: without the API key, and the private key that `Tls` has read."""
    told = asdict(replace(settings, tls=None, metadata=()))
    del told["metadata"]
    return {**told, "workload": _what(settings), "tls": settings.tls is not None}


async def _target(settings: Settings, resources: AsyncExitStack) -> tuple[Target, int | None]:
    """The server, and its model's vocabulary if it is told."""
    if settings.url:
        openai = OpenAITarget(settings.url, settings.model, settings.timeout_s, settings.metadata, settings.tls)
        resources.push_async_callback(openai.close)
        await openai.find_model()
        return openai, settings.vocab
    shoal = ShoalTarget(settings.gateways, settings.model, settings.timeout_s, settings.tls, settings.metadata)
    resources.push_async_callback(shoal.close)
    return shoal, settings.vocab or (await shoal.describe()).vocabulary_tokens


def _asks(settings: Settings, vocabulary_tokens: int | None) -> tuple[list[Ask], list[Ask]]:
    """Requests for the warm-up, and those that are measured: others, so that no prompt is in a cache already."""
    if settings.input:
        given = list(read_asks(settings.input))
        warm_up, measured = given[: settings.warmup], given[settings.warmup :]
        if not measured:
            raise LoadError(f"{settings.input} has {len(given)} requests, --warmup takes them all")
    else:
        warm_up = list(_workload(settings, settings.seed + WARM_UP_SEED, vocabulary_tokens, settings.warmup))
        measured = _workload(settings, settings.seed, vocabulary_tokens, None)
    measured = measured[: settings.requests]
    if settings.rate:
        measured = at_poisson_times(measured, settings.seed, settings.rate)
    return warm_up, measured


def _workload(settings: Settings, seed: int, vocabulary_tokens: int | None, number: int | None) -> list[Ask]:
    if settings.workload not in WORKLOADS:
        raise LoadError(f"--workload {settings.workload!r} is none of {', '.join(WORKLOADS)}")
    if vocabulary_tokens is None:
        raise LoadError("a workload is made of token ids: give --vocab, the model's vocabulary size")
    return list(islice(asks_of(settings.workload, seed, vocabulary_tokens, settings.first_token), number))


async def _load(settings: Settings, target: Target, asks: list[Ask]) -> list[Answer]:
    if settings.concurrency:
        return await closed_loop(target, asks, settings.concurrency, time.perf_counter)
    return await open_loop(target, asks, time.perf_counter)


def _what(settings: Settings) -> str:
    """The workload, or the file in its place."""
    return settings.input.name if settings.input else settings.workload


def _load_name(settings: Settings) -> str:
    what = _what(settings)
    if settings.concurrency:
        return f"{what}, {settings.concurrency} at once"
    return f"{what}, {settings.rate:g} arrivals/s" if settings.rate else f"{what}, at their own times"
