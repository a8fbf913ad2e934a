"""A gateway: submits, serves streams to clients, watches over those that are silent."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from services.common.ids import GatewayId, RequestKey
from services.common.record import moves
from services.common.record.history import Held, first_difference
from services.common.record.reader import Acceptance, Reader, Refused
from services.common.record.record import Attempt, Record
from services.common.record.states import ON_WORKER, RequestState
from services.common.record.transitions import Answer, Verdict
from simulator.protocol import commands as c
from simulator.protocol.checks import Checks
from simulator.protocol.links import ClientCall, CloseFrame, EndFrame, Frames, Link, Open, Refusal, Resume
from simulator.protocol.redis_model import BACKLOG_LIMIT, GATEWAY_TTL_MS, insist
from simulator.protocol.timing import Timing
from simulator.protocol.world import Process, Task, World

if TYPE_CHECKING:
    from simulator.protocol.client import Client

BEAT_MS = 500
WATCH_MS = 300
TRIES = 8
LOST_AFTER_MISSES = 60
PROMPT_TOKENS = 5


@dataclass(slots=True, eq=False)
class Stream:
    """One client's stream."""

    key: RequestKey
    call: ClientCall
    reader: Reader
    origin: Record
    """As it was when the stream began: how to put it back."""
    heard_at: float
    last: Attempt | None = None
    """Whose tokens came last; for the checks only."""
    opens: int = 0
    """Number of its worker's last open."""
    gap_told: bool = False
    """Its worker knows of a gap: until the frame that follows directly, say nothing more."""
    waits: int = 0
    """Looks at its record in a row that found tokens which no worker sends."""
    misses: int = 0
    """Looks in a row at which its record was not there."""


class Gateway(Process):
    """Keeps nothing but open streams."""

    def __init__(self, world: World, name: str, checks: Checks) -> None:
        super().__init__(world, name)
        self.checks = checks
        self.id = GatewayId(name)
        """New at each boot; `name` is its address."""
        self.streams: dict[RequestKey, Stream] = {}
        self.calls: list[ClientCall] = []
        self.timing = Timing()
        self.tenant_limit = 0
        """Most requests of a tenant in flight; 0: any number."""
        self.tokens_per_minute = 0
        """Of a tenant; 0: any number."""

    def boot(self) -> None:
        """Begin with no stream."""
        self.id = GatewayId(f"{self.name}#{self.life}")
        self.streams = {}
        self._attaching: Counter[RequestKey] = Counter()
        self._early: dict[RequestKey, list[tuple[Link, Open]]] = {}
        self._run_id = 0
        self._posted_for = 0
        self.spawn(self._beat())
        self.spawn(self._watch())

    def crash(self) -> None:
        """Every client's connection breaks; some of what was under way still arrives."""
        super().crash()
        for call in self.calls:
            call.open = False
            if self.world.rng.random() < 0.5:
                call.line.cut()
            client: Client = call.client  # type: ignore[assignment]
            delay = max(0.0, call.line.free_at - self.world.now) + self.world.between(0.1, 20)
            self.world.after(delay, client, client.broken, call)
        self.streams, self.calls = {}, []

    # --- calls of clients -----------------------------------------------------------------------------------------

    def generate(self, call: ClientCall, key: RequestKey, spec: c.Spec, deadline_ms: int, resume_ms: int) -> None:
        """RPC Generate, after validation."""
        if self._came(call):
            self.spawn(self._generate(call, key, spec, deadline_ms, resume_ms))

    def attach(self, call: ClientCall, key: RequestKey, held: tuple[Held, ...]) -> None:
        """RPC Attach."""
        if self._came(call):
            self.spawn(self._attach(call, key, held))

    def cancel(self, key: RequestKey) -> None:
        """RPC Cancel."""
        self.spawn(self._try(moves.Cancel(key, "the client asked")))

    def hung_up(self, call: ClientCall) -> None:
        """The client closed its stream."""
        self._close(call)
        for stream in list(self.streams.values()):
            if stream.call is call:
                del self.streams[stream.key]
                self.spawn(self._try(moves.Leave(stream.key, stream.reader.number)))

    def _came(self, call: ClientCall) -> bool:
        return call.gateway_life == self.life

    def _close(self, call: ClientCall) -> None:
        call.open = False
        if call in self.calls:
            self.calls.remove(call)

    def _generate(self, call: ClientCall, key: RequestKey, spec: c.Spec, deadline_ms: int, resume_ms: int) -> Task:
        submit = moves.Submit(
            key=key,
            digest=str(spec),
            payload=b"",
            num_choices=spec.num_choices,
            nonce="",
            gateway=self.id,
            resume_ms=resume_ms,
            deadline_ms=deadline_ms,
            backlog_limit=BACKLOG_LIMIT,
            tenant_limit=self.tenant_limit,
            tokens_per_minute=self.tokens_per_minute,
            prompt_tokens=PROMPT_TOKENS,
            reserved_tokens=spec.max_tokens * spec.num_choices,
        )
        self._attaching[key] += 1
        answered = yield from self._try(submit)
        if answered is None:
            self._settled(key)
            return self._tell_end(call, "unavailable")
        answer, record = answered
        if answer.verdict == Verdict.OK:
            self._accept(call)
            self._begin(call, key, 1, (), record)
        self._settled(key)
        if answer.verdict == Verdict.OK:
            return None
        if answer.verdict == Verdict.KNOWN:
            self._accept(call)
            yield from self._attach(call, key, ())
            return None
        return self._tell_end(call, str(answer.verdict))

    def _accept(self, call: ClientCall) -> None:
        client: Client = call.client  # type: ignore[assignment]
        call.tell(client.was_accepted)

    def _attach(self, call: ClientCall, key: RequestKey, held: tuple[Held, ...]) -> Task:
        self._attaching[key] += 1
        answered = yield from self._try(moves.Attach(key, self.id, held))
        if answered is None:
            self._settled(key)
            return self._tell_end(call, "unavailable")
        answer, record = answered
        if answer.verdict == Verdict.OK:
            self._begin(call, key, answer.index, held, record)
        self._settled(key)
        if answer.verdict == Verdict.OK:
            return None
        if answer.verdict == Verdict.ENDED:
            return self._replay(call, Reader(0, record.num_choices, held), record)
        return self._tell_end(call, str(answer.verdict))

    def _begin(self, call: ClientCall, key: RequestKey, number: int, held: Sequence[Held], record: Record) -> None:
        if not call.open:
            self.spawn(self._try(moves.Leave(key, number)))
            return
        self.checks.stream_begins(key, number)
        older = self.streams.get(key)
        if older is not None:
            if older.reader.number > number:
                self.spawn(self._outnumbered(call, key, number, held))
                return
            self._tell_end(older.call, "superseded")
        self.streams[key] = Stream(key, call, Reader(number, record.num_choices, held), record, self.world.now)

    def _outnumbered(self, call: ClientCall, key: RequestKey, number: int, held: Sequence[Held]) -> Task:
        """A stream here has a higher number: it came later; or Redis lost that it came, and gives numbers again."""
        records = yield from insist(c.Read((key,)))
        record = records.get(key)
        if record is not None and (record.gateway, record.reader) == (self.id, number):
            self.world.stats["attached again to outnumber a lost reader"] += 1
            yield from self._attach(call, key, tuple(held))
        else:
            self._tell_end(call, "superseded")

    # --- messages of workers --------------------------------------------------------------------------------------

    def receive(self, link: Link, message: Any) -> None:
        """From a worker's stream."""
        stream = self.streams.get(message.key)
        if stream is not None:
            stream.heard_at = self.world.now
            stream.waits = 0
        match message:
            case Open():
                self._open(link, stream, message)
            case Frames(_, attempt, frames) if stream is not None:
                for frame in frames:
                    self._frame(link, stream, attempt, frame.choice, frame.index, frame.tokens)
            case EndFrame(_, attempt, state, num_tokens):
                if stream is not None and stream.reader.may_end(attempt):
                    if num_tokens == tuple(claim.count for claim in stream.reader.delivered()):
                        self._end(stream, state)
                    else:
                        stream.heard_at = 0.0  # the record has what is missing
            case CloseFrame(_, reader):
                if stream is not None and stream.reader.number <= reader:
                    # Not yet the end for the client: the record says whether another reader counts.
                    stream.heard_at = 0.0

    def _open(self, link: Link, stream: Stream | None, message: Open) -> None:
        key, attempt, number, opens = message
        if self._attaching[key] and (stream is None or stream.reader.number != number):
            # The script that made this gateway the reader has run, and its answer is on its way here.
            self._early.setdefault(key, []).append((link, message))
            return
        if stream is None or stream.reader.number < number:
            link.to_worker(Refusal(key, attempt, Refused.NO_READER, 0))
            # The record names a reader that is not here: this gateway was started anew, or an answer was lost.
            self.spawn(self._try(moves.Leave(key, number)))
            return
        refused = stream.reader.open(attempt, number)
        if refused is None:
            stream.gap_told, stream.opens = False, opens
            link.to_worker(Resume(key, attempt, stream.reader.delivered(), opens))
        else:
            highest = stream.reader.opened.number if stream.reader.opened else 0
            self.world.stats[f"refused {refused.value}"] += 1
            link.to_worker(Refusal(key, attempt, refused, highest))

    def _frame(
        self, link: Link, stream: Stream, attempt: Attempt, choice: int, index: int, tokens: tuple[int, ...]
    ) -> None:
        acceptance = stream.reader.accept(attempt, choice, index, len(tokens))
        self.world.stats[f"frame {acceptance.value}"] += 1
        match acceptance:
            case Acceptance.NEW:
                stream.last = self.checks.frame_taken(stream.key, attempt, stream.last)
                stream.gap_told = False
                self._deliver(stream, choice, index, tokens)
            case Acceptance.GAP if not stream.gap_told:
                stream.gap_told = True
                link.to_worker(Resume(stream.key, attempt, stream.reader.delivered(), stream.opens))

    def _deliver(self, stream: Stream, choice: int, index: int, tokens: tuple[int, ...]) -> None:
        stream.reader.deliver(choice, tokens)
        client: Client = stream.call.client  # type: ignore[assignment]
        stream.call.tell(client.delta, choice, index, tokens)

    def _end(self, stream: Stream, end: str) -> None:
        self.streams.pop(stream.key, None)
        self._tell_end(stream.call, end)

    def _tell_end(self, call: ClientCall, end: str) -> None:
        client: Client = call.client  # type: ignore[assignment]
        call.tell(client.ended, end)
        self._close(call)

    # --- watching -------------------------------------------------------------------------------------------------

    def _watch(self) -> Task:
        """Ask of silent streams where their requests stand."""
        while True:
            yield WATCH_MS
            silent = [s for s in self.streams.values() if s.heard_at + self.timing.silent <= self.world.now]
            if not silent:
                continue
            records = yield c.Read(tuple(stream.key for stream in silent))
            if records is c.RECOVERING:
                yield from self._post_holdings()
            if isinstance(records, c.Trouble):
                continue
            for stream in silent:
                if self.streams.get(stream.key) is stream and not self._attaching[stream.key]:
                    yield from self._judge(stream, records.get(stream.key))

    def _judge(self, stream: Stream, record: Record | None) -> Task:
        number = stream.reader.number
        stream.misses = stream.misses + 1 if record is None else 0
        if record is None:
            if stream.misses > LOST_AFTER_MISSES:
                self.checks.fail(f"{stream.key}: Redis lost it, and nobody puts it back for its open stream")
            yield from self._state_unknown()
        elif record.ended:
            self.world.stats["ends found by watching"] += 1
            self.streams.pop(stream.key)
            superseded = record.reader > number and record.gateway != self.id
            self._replay(stream.call, stream.reader, record, "superseded" if superseded else "diverged")
        elif record.gateway == self.id:
            if record.reader != number or record.reader_left_at_ms:
                yield from self._attach_again(stream)
            delivered = sum(claim.count for claim in stream.reader.delivered())
            journaled = sum(len(tokens) for tokens in record.journal)
            starves = record.state in ON_WORKER and journaled > delivered and self.checks.quiet
            stream.waits = stream.waits + 1 if starves else 0
            self.checks.stream_waits(stream.key, stream.waits, delivered, journaled)
        elif record.reader >= number:
            self._end(stream, "superseded")
        else:
            yield from self._attach_again(stream)

    def _attach_again(self, stream: Stream) -> Task:
        """Redis does not know that this stream counts: it lost that, or was told that this gateway is dead."""
        self.world.stats["attached again by the gateway"] += 1
        self._attaching[stream.key] += 1
        answered = yield from self._try(moves.Attach(stream.key, self.id, stream.reader.delivered()))
        left = False
        if answered is not None and answered[0].verdict == Verdict.OK:
            number = answered[0].index
            if self.streams.get(stream.key) is stream:
                self.checks.stream_begins(stream.key, number)
                stream.reader.number = number
            else:
                left = stream.key not in self.streams
        self._settled(stream.key)
        if left:
            yield from self._try(moves.Leave(stream.key, number))

    def _settled(self, key: RequestKey) -> None:
        """A script that may make this gateway the reader has answered: what workers asked too early is heard now."""
        self._attaching[key] -= 1
        if not self._attaching[key]:
            for link, early in self._early.pop(key, ()):
                self.receive(link, early)

    def _replay(self, call: ClientCall, reader: Reader, record: Record, otherwise: str = "diverged") -> None:
        """Tell an end that stands in the record; or `otherwise`, where it is not the end of what was delivered."""
        client: Client = call.client  # type: ignore[assignment]
        held = reader.delivered()
        fits = all(
            first_difference(known, claim) is None and claim.count <= len(known)
            for known, claim in zip(record.journal, held, strict=True)
        )
        if fits:
            for choice, (known, claim) in enumerate(zip(record.journal, held, strict=True)):
                if claim.count < len(known):
                    call.tell(client.delta, choice, claim.count, known[claim.count :])
        elif record.state == RequestState.FINISHED:
            return self._tell_end(call, otherwise)
        return self._tell_end(call, str(record.state))

    # --- Redis ----------------------------------------------------------------------------------------------------

    def _beat(self) -> Task:
        last = self.world.now
        while True:
            beaten = yield c.Beat(self.id)
            if beaten is not c.LOST:
                if beaten.recovering or (self._run_id and beaten.run_id != self._run_id):
                    if beaten.recovering:
                        yield from self._post_holdings()
                    for stream in self.streams.values():
                        stream.heard_at = 0.0
                self._run_id = beaten.run_id if not beaten.recovering else self._run_id
                if not beaten.was_alive and self.world.now - last > GATEWAY_TTL_MS / 2:
                    # The leader may have told that its readers left.
                    for stream in list(self.streams.values()):
                        if self.streams.get(stream.key) is stream and not self._attaching[stream.key]:
                            yield from self._attach_again(stream)
                last = self.world.now
            yield BEAT_MS

    def _post_holdings(self) -> Task:
        """Say what is served here, so that the leader can put back what Redis lost."""
        beaten = yield from insist(c.Beat(self.id))
        if beaten.run_id == self._posted_for:
            return
        self._posted_for = beaten.run_id
        self.world.stats["holdings of gateways"] += 1
        yield from self._state(beaten.run_id, list(self.streams.values()))

    def _state_unknown(self) -> Task:
        """The recovery is over, and did not hear of these: this gateway stood still through it, say."""
        beaten = yield c.Beat(self.id)
        if beaten is not c.LOST and not beaten.recovering:
            yield from self._state(beaten.run_id, [stream for stream in self.streams.values() if stream.misses])

    def _state(self, run_id: int, streams: list[Stream]) -> Task:
        requests = tuple(self._holding(stream) for stream in streams)
        yield from insist(c.Post(run_id, self.id, requests))

    def _holding(self, stream: Stream) -> c.HeldRequest:
        reader, origin = stream.reader, stream.origin
        held = reader.delivered()
        restore = moves.Restore(
            key=stream.key,
            fence="",
            digest=origin.digest,
            payload=origin.payload,
            num_choices=origin.num_choices,
            nonce="",
            gateway=self.id,
            reader=reader.number,
            resume_ms=origin.resume_ms,
            accepted_at_ms=origin.accepted_at_ms,
            deadline_at_ms=origin.deadline_at_ms,
            journal=tuple(claim.tokens for claim in held),
            floor=0,
        )
        return c.HeldRequest(stream.key, reader.opened, False, held, restore)

    def _try(self, move: moves.Move) -> Task:
        """Ask Redis a few times. None: it does not answer."""
        for _ in range(TRIES):
            if isinstance(move, moves.Submit):
                move = replace(move, nonce=self._nonce())  # see insist_anew
            answer: Answer | c.Trouble = yield move
            if answer is c.RECOVERING:
                yield from self._post_holdings()
                yield 150
            elif answer is c.LOST:
                yield self.world.between(30, 120)
            else:
                return answer
        return None

    def _nonce(self) -> str:
        return f"{self.world.rng.getrandbits(48):012x}"
