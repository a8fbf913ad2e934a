"""A worker waits for its engine to load, but not for one that hangs: it names it, starts another, ends after some."""

import os
import signal
from collections.abc import Callable

import psutil
import pytest
from redis.asyncio import Redis

from gen.shoal.fleet.v1 import engine_pb2
from services.common.model.location import default_model_path
from services.common.telemetry.metrics import Metrics
from services.common.telemetry.tracing import NoTracer
from services.common.text.vocabulary import Vocabulary
from services.worker.config import WorkerConfig
from services.worker.front import worker as worker_module
from services.worker.front.engine_client import EngineUnfitError
from services.worker.front.metrics import WorkerMetrics
from services.worker.front.worker import EngineStartError, Worker


def a_worker(
    on_loading: Callable[[engine_pb2.EngineLoading], None] = lambda loading: None,
    kv_cache_bytes: int = 1 << 28,
    shards: int = 1,
) -> Worker:
    """None of its engines gets so far that Redis is wanted."""
    config = WorkerConfig(model_path=default_model_path(), kv_cache_bytes=kv_cache_bytes, shards=shards)
    vocabulary = Vocabulary((b"a",), end_token_ids=(0,))
    metrics = WorkerMetrics(Metrics())
    return Worker(config, Redis(), vocabulary, "127.0.0.1:1", lambda engine: None, on_loading, metrics, NoTracer())


async def test_an_engine_that_hangs_while_it_loads_is_ended_and_what_it_did_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(worker_module, "LONGEST_SILENCE_S", 5.0)
    monkeypatch.setattr(worker_module, "LOAD_FAILURES", 1)
    engines: list[psutil.Process] = []

    def hang(loading: engine_pb2.EngineLoading) -> None:
        assert loading.stage == "starting torch"
        # Not this process' other children: a Redis for other tests is one.
        children = psutil.Process().children()
        engines[:] = [child for child in children if "services.worker.engine_process" in child.cmdline()]
        for engine in engines:
            os.kill(engine.pid, signal.SIGSTOP)

    said = "1 times in a row; at last the engine said nothing for 5 s, the limit, while starting torch"
    with pytest.raises(EngineStartError, match=said):
        await a_worker(hang).run()
    assert engines
    assert not any(engine.is_running() for engine in engines)


async def test_after_some_engines_that_say_nothing_the_worker_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    # Less than any process takes to start.
    monkeypatch.setattr(worker_module, "LONGEST_SILENCE_S", 0.001)
    monkeypatch.setattr(worker_module, "FIRST_PAUSE_S", 0.01)
    with pytest.raises(EngineStartError, match=r"5 times in a row; at last .* for 0\.001 s, the limit, while starting"):
        await a_worker().run()


@pytest.mark.parametrize(
    ("shards", "kv_cache_bytes", "said"),
    [
        (1, 1, "--kv-cache-bytes is 1; the least is one block"),
        (3, 1, "--kv-cache-bytes is 1; the least is one block"),
        (1, 1 << 50, "this machine's memory does not hold the KV cache: lower --kv-cache-bytes"),
    ],
)
async def test_an_engine_that_says_that_none_can_start_ends_the_worker_at_once_with_its_words(
    shards: int, kv_cache_bytes: int, said: str
) -> None:
    started: list[str] = []
    worker = a_worker(lambda loading: started.append(loading.stage), kv_cache_bytes=kv_cache_bytes, shards=shards)
    with pytest.raises(EngineUnfitError, match=said):
        await worker.run()
    assert started.count("starting torch") == 1
