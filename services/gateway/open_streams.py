"""All open streams of this gateway, by request; and requests whose stream is about to open.

A worker may ask to send before the script that made this gateway the reader has answered here: between the two, the
request is *arriving*, and what workers ask is kept until it has settled.
"""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager

from services.common.errors import Aborted
from services.common.ids import RequestKey
from services.gateway.streams import Stream


class OpenStreams:
    """Which stream of this gateway serves a request. Changed on the gateway's event loop only."""

    def __init__(self) -> None:
        self._streams: dict[RequestKey, Stream] = {}
        self._arriving: dict[RequestKey, _Arrival] = {}

    def __len__(self) -> int:
        return len(self._streams)

    def __iter__(self) -> Iterator[Stream]:
        return iter(list(self._streams.values()))

    def get(self, key: str) -> Stream | None:
        """The stream of a request, or None."""
        return self._streams.get(RequestKey(key))

    @contextmanager
    def arriving(self, key: RequestKey) -> Iterator[None]:
        """Keep what is asked by `when_settled` for this request, until the block is left."""
        arrival = self._arriving.setdefault(key, _Arrival())
        arrival.num_calls += 1
        try:
            yield
        finally:
            arrival.num_calls -= 1
            if not arrival.num_calls:
                del self._arriving[key]
            self._settle(arrival)

    def is_arriving(self, key: str) -> bool:
        """Whether a stream may be about to open."""
        return key in self._arriving

    def when_settled(self, key: str, asker: Hashable, ask: Callable[[], None]) -> None:
        """Run `ask` once the arriving request has a stream, or will get none. An asker's last `ask` counts."""
        self._arriving[RequestKey(key)].asked[asker] = ask

    def has_higher(self, stream: Stream) -> bool:
        """Whether its request has a stream here whose reader's number is higher."""
        other = self._streams.get(stream.key)
        return other is not None and other.reader.number > stream.reader.number

    def install(self, stream: Stream) -> None:
        """Make it the stream of its request. The reader with the higher number wins; the other stream ends."""
        if self.has_higher(stream):
            stream.finish(superseded())
            return
        older = self._streams.get(stream.key)
        if older is not None:
            older.finish(superseded())
        self._streams[stream.key] = stream

    def remove(self, stream: Stream) -> None:
        """Its client has gone."""
        if self._streams.get(stream.key) is stream:
            del self._streams[stream.key]

    @staticmethod
    def _settle(arrival: "_Arrival") -> None:
        asked = list(arrival.asked.values())
        arrival.asked.clear()
        # Whoever still finds no stream, but another call arriving, asks again.
        for ask in asked:
            ask()


class _Arrival:
    def __init__(self) -> None:
        self.num_calls = 0
        self.asked: dict[Hashable, Callable[[], None]] = {}


def superseded() -> Aborted:
    """The end of a stream whose request a later Attach reads."""
    return Aborted("a later Attach reads this request now; this stream ends here", reason="SUPERSEDED")
