"""Blocking reads of streams; never polling. A reader keeps the id of the last entry that it has seen.

An id is passed as `after`: `FIRST` reads from the beginning, what `last_id` gives from now on. No read waits longer
than MAX_BLOCK_MS, and all raise StoreUnavailable. A repeated read gives the same entries again: nothing is consumed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from redis.asyncio import Redis

from services.common.store.connection import MAX_BLOCK_MS, translated, waiting_command

FIRST = "0-0"
"""Before every entry."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of a stream, as Redis has it."""

    id: str
    fields: Mapping[bytes, bytes]


async def read_many(redis: Redis, after: Mapping[str, str], block_ms: int, count: int) -> dict[str, list[Entry]]:
    """Entries of several streams (of one slot) behind the given ids, at most `count` of each.

    Returns at once if there are any; else after `block_ms` (0: at once; at most MAX_BLOCK_MS). Streams without new
    entries are absent. `Intake.parse` and `Events.parse` give the entries meaning.
    """
    return _entries(await waiting_command(redis, *_xread(after, block_ms, count)))


async def read_with_time(redis: Redis, stream: str, after: str, block_ms: int, count: int) -> tuple[list[Entry], int]:
    """Like `read_many` for one stream, and Redis' time in ms after it waited, in the same round trip."""
    pipeline = redis.pipeline(transaction=False)
    pipeline.execute_command(*_xread({stream: after}, block_ms, count))
    pipeline.execute_command("TIME")
    with translated():
        reply, (seconds, microseconds) = await pipeline.execute()
    return _entries(reply).get(stream, []), int(seconds) * 1000 + int(microseconds) // 1000


async def last_id(redis: Redis, stream: str) -> str:
    """Id of the last entry that a stream has now; FIRST if it has none."""
    newest = await read_newest(redis, stream, 1)
    return newest[0].id if newest else FIRST


async def read_newest(redis: Redis, stream: str, count: int) -> list[Entry]:
    """The last `count` entries, oldest first; without waiting."""
    return _parsed((await waiting_command(redis, "XREVRANGE", stream, "+", "-", "COUNT", count))[::-1])


def _xread(after: Mapping[str, str], block_ms: int, count: int) -> tuple[str | int, ...]:
    block: tuple[str | int, ...] = ("BLOCK", min(block_ms, MAX_BLOCK_MS)) if block_ms > 0 else ()
    return ("XREAD", "COUNT", count, *block, "STREAMS", *after.keys(), *after.values())


def _entries(reply: Any) -> dict[str, list[Entry]]:
    """The reply to XREAD as redis-py gives it: RESP3 {stream: [entries]}, RESP2 [[stream, entries]]."""
    if isinstance(reply, dict):
        streams = [(stream, entries) for stream, lists in reply.items() for entries in lists]
    else:
        streams = [(stream, entries) for stream, entries in reply or ()]
    return {stream.decode(): _parsed(entries) for stream, entries in streams}


def _parsed(entries: Sequence[Any]) -> list[Entry]:
    return [Entry(entry_id.decode(), fields) for entry_id, fields in entries]
