"""Blocking reads of streams; never polling. A reader keeps the id of the last entry that it has seen.

An id is passed as `after`: `FIRST` reads from the beginning. No read waits longer than MAX_BLOCK_MS, and all raise
StoreUnavailable. A repeated read gives the same entries again: nothing is consumed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from redis.asyncio import Redis

from services.common.store.codec import pairs
from services.common.store.connection import MAX_BLOCK_MS, waiting_command

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
    block: tuple[str | int, ...] = ("BLOCK", min(block_ms, MAX_BLOCK_MS)) if block_ms > 0 else ()
    streams = ("STREAMS", *after.keys(), *after.values())
    reply = await waiting_command(redis, "XREAD", "COUNT", count, *block, *streams)
    return {stream.decode(): _parsed(entries) for stream, entries in (reply or {}).items()}


async def read_newest(redis: Redis, stream: str, count: int) -> list[Entry]:
    """The last `count` entries, oldest first; without waiting."""
    return _parsed((await waiting_command(redis, "XREVRANGE", stream, "+", "-", "COUNT", count))[::-1])


def _parsed(entries: Sequence[Any]) -> list[Entry]:
    return [Entry(entry_id.decode(), pairs(fields)) for entry_id, fields in entries]
