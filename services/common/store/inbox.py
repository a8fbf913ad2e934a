"""A worker's inbox: what it is given to do, as its front reads it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from redis.asyncio import Redis

from gen.shoal.fleet.v1.request_pb2 import RequestPayload
from services.common.ids import RequestKey, WorkerId
from services.common.record.record import Attempt
from services.common.store.clock import now_ms
from services.common.store.codec import pairs, unpack_tokens
from services.common.store.connection import command
from services.common.store.keys import Keys
from services.common.store.scripts import Script
from services.common.store.streams import Entry, read_many


@dataclass(frozen=True, slots=True)
class Start:
    """Run a request under this attempt. The entry stays until the request is released: finished or requeued."""

    key: RequestKey
    attempt: Attempt
    gateway: str
    """Id of the gateway to send to; `ids.fleet_address` says where it is."""
    reader: int
    payload: RequestPayload
    journal: tuple[tuple[int, ...], ...]
    """Tokens generated before, by choice."""
    remaining_ms: int
    """Until its deadline, counted from this read; at least 1. 0: no deadline."""
    suspect_until: int
    """Not 0: it runs alone until a choice's journal has this many tokens."""
    accepted_at_ms: int
    """Redis' clock, ms since the epoch."""
    placed_at_ms: int
    """Of its first placement; same clock."""


@dataclass(frozen=True, slots=True)
class CancelAttempt:
    """End this attempt if it runs here (then finish it as cancelled), or forget it: a finish is refused then."""

    key: RequestKey
    attempt: Attempt


@dataclass(frozen=True, slots=True)
class Redirect:
    """Another reader counts from now on."""

    key: RequestKey
    attempt: Attempt
    gateway: str
    """Id of its gateway."""
    reader: int


@dataclass(frozen=True, slots=True)
class Drain:
    """Take nothing new, and hand over what runs."""


InboxMessage = Start | CancelAttempt | Redirect | Drain


@dataclass(frozen=True, slots=True)
class Outstanding:
    """A request that a worker has: started in its inbox, and not released."""

    key: RequestKey
    attempt: Attempt
    prompt_tokens: int
    generated_tokens: int
    """In the journal when it was placed, over all choices."""
    max_tokens: int
    num_choices: int
    traceparent: str


class Inbox:
    """The inbox of one worker. Only that worker's front calls `read`; anybody may ask what is outstanding."""

    def __init__(self, redis: Redis, pool: str, worker: WorkerId) -> None:
        self._redis = redis
        self._keys = Keys(pool)
        self._stream = self._keys.inbox(worker)
        self._outstanding = Script.load("outstanding")
        self._notices: list[str] = []

    async def read(self, after: str, block_ms: int, count: int) -> list[tuple[str, InboxMessage]]:
        """Messages behind `after`, with their ids; see `streams`.

        Whatever is no Start is deleted by the next read, so that an inbox holds no more than what is outstanding: a
        read that is repeated after an error gives them again, a second read from an older id does not.
        """
        await self._delete_notices()
        entries = (await read_many(self._redis, {self._stream: after}, block_ms, count)).get(self._stream, [])
        # Only a deadline is told by how long it is away: without one, the time is not asked for.
        has_deadline = any(entry.fields.get(b"deadline_at_ms", b"0") != b"0" for entry in entries)
        messages = self.parse(entries, await now_ms(self._redis) if has_deadline else 0)
        self._notices = [entry_id for entry_id, message in messages if not isinstance(message, Start)]
        return messages

    @staticmethod
    def parse(entries: Sequence[Entry], now_ms: int) -> list[tuple[str, InboxMessage]]:
        """Entries of an inbox's stream. `now_ms`: Redis' clock when they were read; of use only to a deadline."""
        return [(entry.id, _PARSERS[entry.fields[b"type"]](entry.fields, now_ms)) for entry in entries]

    async def outstanding(self) -> list[Outstanding]:
        """What this worker has, oldest first. Raises StoreUnavailable."""
        reply = await self._outstanding.call(
            self._redis, (self._keys.generation, self._stream), (self._keys.prefix, "", 0)
        )
        return [_outstanding(pairs(fields)) for fields in reply]

    async def _delete_notices(self) -> None:
        if self._notices:
            await command(self._redis, "XDEL", self._stream, *self._notices)
            self._notices = []


def _start(fields: Mapping[bytes, bytes], now_ms: int) -> Start:
    deadline_at_ms = int(fields[b"deadline_at_ms"])
    return Start(
        key=_key(fields),
        attempt=_attempt(fields),
        gateway=fields[b"gateway"].decode(),
        reader=int(fields[b"reader"]),
        payload=RequestPayload.FromString(fields[b"payload"]),
        journal=tuple(unpack_tokens(fields[f"journal{choice}".encode()]) for choice in range(int(fields[b"n"]))),
        remaining_ms=max(1, deadline_at_ms - now_ms) if deadline_at_ms else 0,
        suspect_until=int(fields[b"suspect_until"]),
        accepted_at_ms=int(fields[b"accepted_at_ms"]),
        placed_at_ms=int(fields[b"placed_at_ms"]),
    )


def _cancel(fields: Mapping[bytes, bytes], now_ms: int) -> CancelAttempt:
    return CancelAttempt(_key(fields), _attempt(fields))


def _redirect(fields: Mapping[bytes, bytes], now_ms: int) -> Redirect:
    return Redirect(_key(fields), _attempt(fields), fields[b"gateway"].decode(), int(fields[b"reader"]))


def _drain(fields: Mapping[bytes, bytes], now_ms: int) -> Drain:
    return Drain()


_PARSERS: Mapping[bytes, Callable[[Mapping[bytes, bytes], int], InboxMessage]] = {
    b"start": _start,
    b"cancel": _cancel,
    b"redirect": _redirect,
    b"drain": _drain,
}


def _outstanding(fields: Mapping[bytes, bytes]) -> Outstanding:
    return Outstanding(
        key=_key(fields),
        attempt=_attempt(fields),
        prompt_tokens=int(fields[b"prompt_tokens"]),
        generated_tokens=int(fields[b"generated_tokens"]),
        max_tokens=int(fields[b"max_tokens"]),
        num_choices=int(fields[b"n"]),
        traceparent=fields[b"traceparent"].decode(),
    )


def _key(fields: Mapping[bytes, bytes]) -> RequestKey:
    return RequestKey(fields[b"key"].decode())


def _attempt(fields: Mapping[bytes, bytes]) -> Attempt:
    return Attempt(int(fields[b"attempt"]), fields[b"nonce"].decode())
