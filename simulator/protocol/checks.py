"""The invariants of docs/protocol.md, checked from outside: by what Redis stores and by what clients see."""

from collections import Counter, defaultdict
from typing import TYPE_CHECKING

from services.common.ids import RequestKey
from services.common.record import moves
from services.common.record.record import Attempt, Record
from services.common.record.states import ON_WORKER, RequestState
from services.common.record.token_budget import MINUTE_MS
from services.common.record.transitions import Pool, Transition, Verdict
from simulator.protocol.commands import Spec
from simulator.protocol.text import Texts
from simulator.protocol.world import World

if TYPE_CHECKING:
    from simulator.protocol.client import Client
    from simulator.protocol.redis_model import Data
    from simulator.protocol.worker import Worker


OF_THE_LEADER = frozenset({"crash_leader", "freeze_leader"})
"""Faults (of `faults.KINDS`) that only leaders suffer: no worker may be declared lost for them."""
UNSEEN = OF_THE_LEADER | {"crash_worker", "kill_engine", "stall_engine", "freeze_worker"}
"""Faults that no client may notice, but by its patience."""
PROMPT = frozenset({"kill_engine"})
"""Faults that hold up no end."""
PROMPT_MS = 100
"""A cancelled request that a worker has ends within this, unless something holds it up."""
LATE_MS = 400
"""No request ends later than this after its deadline, unless something holds it up."""
STARVED_LOOKS = 6
QUIET_AFTER_MS = 1000
ABOUT_TOKENS = 0.1
"""By so much a tenant's tokens may differ for rounding to ms."""


class Violation(Exception):
    """An invariant is broken."""


class Checks:
    """Watches one schedule. Raises Violation at the first breach."""

    def __init__(self, world: World, texts: Texts) -> None:
        self.world = world
        self.texts = texts
        self.specs: dict[RequestKey, Spec] = {}
        self.quiet_from = 0.0
        """When the last fault has passed."""
        self.writes_lost = False
        """Redis has restarted without its last writes."""
        self.ends: defaultdict[RequestKey, list[Record]] = defaultdict(list)
        """Every end that was ever written. More than one only where Redis lost the first."""
        self.accepted: set[RequestKey] = set()
        """Requests whose client was told so."""
        self.deaths: Counter[RequestKey] = Counter()
        """How often an engine died in a step that held this request."""
        self.lonely_deaths: Counter[RequestKey] = Counter()
        """... and nothing else."""
        self.graces: Counter[RequestKey] = Counter()
        """How often an attempt began without hearing from a reader."""
        self.twins: set[RequestKey] = set()
        """Requests that a second client attached to, perhaps with fewer tokens."""
        self.attaches: Counter[RequestKey] = Counter()
        self._cancelled: dict[RequestKey, float] = {}
        """When its end was asked for, while a worker had it."""
        self._slow_ends: list[str] = []
        """Ends that came later than they need where nothing goes wrong."""
        self._begun: set[tuple[RequestKey, Attempt]] = set()
        self._readers: dict[RequestKey, int] = {}
        self._levels: dict[str, tuple[float, float]] = {}
        """What each tenant had of its tokens a minute, and when."""
        self._metered: dict[RequestKey, moves.Submit] = {}
        """Live requests whose tokens are counted."""

    @property
    def quiet(self) -> bool:
        """Whether the last fault passed so long ago that every stream should be served."""
        return self.world.now > self.quiet_from + QUIET_AFTER_MS

    def redis_lost_writes(self) -> None:
        """From now on, what stood in the lost writes may be missing."""
        self.writes_lost = True
        self._cancelled.clear()
        self.world.stats["redis restarts"] += 1

    def fail(self, what: str) -> None:
        """Report a breach."""
        raise Violation(f"at {self.world.now:.1f} ms: {what}")

    # --- what Redis stores ----------------------------------------------------------------------------------------

    def moved(self, data: "Data", before: Record | None, move: moves.Move, step: Transition, pool: Pool) -> None:
        """One script ran."""
        verdict = step.answer.verdict
        self.world.stats[f"{type(move).__name__} {verdict}"] += 1
        after = step.record
        if isinstance(move, moves.Submit) and move.tokens_per_minute and not self.writes_lost:
            self._take_tokens(move, verdict)
        if after is None or after is before:
            self._twins(before, move)
            return
        key = move.key
        fence = getattr(move, "fence", "")
        if fence and fence != pool.fence:
            self.fail(f"{key}: {type(move).__name__} by {fence}, who does not lead")
        if before is not None:
            if before.ended:
                self.fail(f"{key}: {type(move).__name__} changed it after its end")
            if after.attempt.number < before.attempt.number:
                self.fail(f"{key}: attempt went back")
            if after.worker and before.worker and after.worker != before.worker:
                self.fail(f"{key}: went from {before.worker} to {after.worker} with no attempt between")
            if isinstance(move, moves.Leave) and move.reader != before.reader:
                self.fail(f"{key}: reader {move.reader} left for {before.reader}, who counts")
        if isinstance(move, moves.Place) and after.state == RequestState.PLACED:
            self._placed(key, after, pool)
        if isinstance(move, moves.Submit) and move.tenant_limit:
            in_flight = in_flight_of(data, key)
            if in_flight > move.tenant_limit:
                self.fail(f"{key}: accepted as number {in_flight} of its tenant, whose limit is {move.tenant_limit}")
        if isinstance(move, moves.Attach):
            self.attaches[key] += 1
        if isinstance(move, moves.Cancel) and verdict == Verdict.OK:
            self._cancelled.setdefault(key, self.world.now)
        if after.ended:
            self._ended(key, after)
            self._give_back_tokens(key, after)
        self._lists(data, key, after)

    def _twins(self, before: Record | None, move: moves.Move) -> None:
        attempt = getattr(move, "attempt", None)
        if before and attempt and attempt.number == before.attempt.number and attempt.nonce != before.attempt.nonce:
            self.world.stats["fenced by the nonce alone"] += 1

    def _placed(self, key: RequestKey, record: Record, pool: Pool) -> None:
        if record.deadline_at_ms and record.deadline_at_ms <= pool.now_ms:
            self.fail(f"{key}: placed after its deadline")
        if key in self._cancelled:
            self.fail(f"{key}: placed after it was cancelled")

    def _ended(self, key: RequestKey, record: Record) -> None:
        self.world.stats[f"ended {record.state}"] += 1
        self.ends[key].append(record)
        if len(self.ends[key]) > 1 and not self.writes_lost:
            self.fail(f"{key}: ended twice")
        if not all(
            self.texts.is_true(self.texts.beginning(key, choice), tokens)
            for choice, tokens in enumerate(record.journal)
        ):
            self.fail(f"{key}: its journal holds tokens that follow another beginning")
        asked_at = self._cancelled.get(key, self.world.now)
        if self.world.now > asked_at + PROMPT_MS:
            self._slow_ends.append(f"{key}: {record.state} {self.world.now - asked_at:.0f} ms after it was cancelled")
        if record.deadline_at_ms and self.world.now > record.deadline_at_ms + LATE_MS:
            late_ms = self.world.now - record.deadline_at_ms
            self._slow_ends.append(f"{key}: {record.state} {late_ms:.0f} ms after its deadline")
        spec = self.specs[key]
        if record.state == RequestState.QUARANTINED and (self.deaths[key] < 2 or not self.lonely_deaths[key]):
            self.fail(f"{key}: quarantined without two deaths of engines, one of them alone")
        if record.state == RequestState.FINISHED and spec.poison_after >= 0 and not self.writes_lost:
            longest = max(len(tokens) for tokens in record.journal)
            if longest > spec.poison_after + 3:
                self.fail(f"{key}: a poisonous request finished")

    def _take_tokens(self, move: moves.Submit, verdict: Verdict) -> None:
        """Its tenant's tokens, reckoned as a level: it is accepted if there are so many, and only then."""
        tokens = move.prompt_tokens + move.reserved_tokens
        level = self._level(move.key, move.tokens_per_minute)
        if verdict == Verdict.TOKENS and level >= tokens + ABOUT_TOKENS:
            self.fail(f"{move.key}: refused {tokens} tokens, and its tenant had {level:.1f}")
        if verdict == Verdict.OK:
            if level < tokens - ABOUT_TOKENS:
                self.fail(f"{move.key}: accepted with {tokens} tokens, and its tenant had {level:.1f}")
            self._levels[tenant_of(move.key)] = level - tokens, self.world.now
            self._metered[move.key] = move

    def _give_back_tokens(self, key: RequestKey, record: Record) -> None:
        move = self._metered.pop(key, None)
        if move is not None:
            unused = move.reserved_tokens - sum(len(tokens) for tokens in record.journal)
            level = self._level(key, move.tokens_per_minute) + unused
            self._levels[tenant_of(key)] = level, self.world.now

    def _level(self, key: RequestKey, per_minute: int) -> float:
        level, since = self._levels.get(tenant_of(key), (float(per_minute), 0.0))
        return min(per_minute, level + per_minute * (self.world.now - since) / MINUTE_MS)

    def _lists(self, data: "Data", key: RequestKey, record: Record) -> None:
        queued = data.intake.get(key)
        if (queued is not None) != (record.state == RequestState.QUEUED):
            self.fail(f"{key}: {record.state}, but {'' if queued else 'not '}in the intake")
        if queued is not None and queued.attempt != record.attempt:
            self.fail(f"{key}: its entry in the intake has another attempt than its record")
        where = [worker for worker, starts in data.outstanding.items() if key in starts]
        expected = [record.worker] if record.state in ON_WORKER else []
        if where != expected:
            self.fail(f"{key}: {record.state} on {expected}, but its reservation is at {where}")

    # --- what gateways and clients see ----------------------------------------------------------------------------

    def attempt_begins(self, key: RequestKey, attempt: Attempt) -> None:
        """A worker takes an attempt from its inbox."""
        if (key, attempt) in self._begun:
            self.fail(f"{key}: attempt {attempt.number} was begun twice")
        self._begun.add((key, attempt))

    def stream_begins(self, key: RequestKey, reader: int) -> None:
        """A gateway serves a reader. The last one counts, so no number may come twice."""
        last = self._readers.get(key, 0)
        if reader == last and not self.writes_lost:
            self.fail(f"{key}: two streams have reader number {reader}")
        self._readers[key] = max(last, reader)

    def samples(self, key: RequestKey, attempt: Attempt, heard: bool) -> None:
        """An engine samples; `heard`: its reader said what it holds, or the grace has passed."""
        if attempt.number > 1 and not heard:
            self.fail(f"{key}: attempt {attempt.number} samples before it has heard what its reader holds")

    def frame_taken(self, key: RequestKey, attempt: Attempt, last: Attempt | None) -> Attempt:
        """A gateway took tokens; the attempts of one stream must go up. Returns the attempt."""
        if last is not None and attempt != last and attempt.number <= last.number:
            self.fail(f"{key}: a reader was given tokens of attempt {attempt.number} after {last.number}")
        return attempt

    def stream_waits(self, key: RequestKey, looks: int, delivered: int, journaled: int) -> None:
        """A gateway found its reader in the record, and tokens in the journal that it was not sent, so many times."""
        if looks > STARVED_LOOKS:
            self.fail(f"{key}: its journal has {journaled} tokens, and its reader was left at {delivered}")

    def client_was_given(self, client: "Client", choice: int, index: int, tokens: tuple[int, ...]) -> None:
        """A delta reached a client."""
        held = client.held[choice]
        if index != len(held):
            self.fail(f"{client.key}: {client.name} holds {len(held)} tokens and was given index {index}")
        if not self.texts.is_true(client.chains[choice], tokens):
            self.fail(f"{client.key}: {client.name} was given tokens that follow another beginning, from {index}")

    def client_was_told(self, client: "Client", end: str) -> None:
        """A stream ended for a client."""
        self.world.stats[f"client {end}"] += 1
        if client.end:
            self.fail(f"{client.key}: {client.name} was told {end} after {client.end}")
        key = client.key
        ends = self.ends[key]
        held = tuple(tuple(tokens) for tokens in client.held)
        if end == "finished":
            if not any(record.state == RequestState.FINISHED and record.journal == held for record in ends):
                self.fail(f"{key}: {client.name} was told it finished, with {held}; Redis has {_journals(ends)}")
        elif end in ("cancelled", "expired", "quarantined", "failed"):
            if all(record.state != end for record in ends):
                self.fail(f"{key}: {client.name} was told {end}, which its record never was")
        elif end in ("quota", "tokens"):
            if key in self.accepted:
                self.fail(f"{key}: {client.name} was told of a quota after it was accepted")
        elif end == "superseded":
            if not self.attaches[key]:
                self.fail(f"{key}: {client.name} superseded, though nobody attached")
        elif end == "diverged":
            if not self.graces[key] and key not in self.twins and not self.writes_lost:
                self.fail(f"{key}: {client.name} was told of another history, though every attempt heard its reader")
        elif end == "unknown" and not self.writes_lost:
            self.fail(f"{key}: an accepted request is unknown")

    # --- after the quiet period -----------------------------------------------------------------------------------

    def all_ended(self, data: "Data", clients: list["Client"]) -> bool:
        """Whether nothing is left to happen."""
        return all(client.is_done for client in clients) and all(record.ended for record in data.records.values())

    def at_end(self, data: "Data", clients: list["Client"], workers: list["Worker"], kinds: frozenset[str]) -> None:
        """The schedule is over, and `kinds` of faults were in it."""
        for client in clients:
            if not client.is_done:
                self.fail(f"{client.key}: {client.name} waits for ever")
        for record in data.records.values():
            if not record.ended:
                self.fail(f"{record.key}: {record.state} for ever, attempt {record.attempt.number}")
        for key in self.accepted:
            if key not in data.records and not self.writes_lost:
                self.fail(f"{key}: accepted, and gone")
        for worker, starts in data.outstanding.items():
            if starts:
                self.fail(f"inbox of {worker} is not released: {list(starts)}")
        for process in workers:
            if process.up and process.jobs:
                self.fail(f"{process.name} still runs {list(process.jobs)}")
        self._alike(data)
        poisoned = any(spec.poison_after >= 0 for spec in self.specs.values())
        if kinds <= UNSEEN:
            for client in clients:
                allowed = client.expected_ends | ({"quarantined"} if kinds or poisoned else set())
                if self.graces[client.key] or client.key in self.twins:
                    # It was away for so long that its request went on without the tokens that only it held.
                    allowed.add("diverged")
                if client.end not in allowed:
                    self.fail(f"{client.key}: {client.name} ended with {client.end!r}, which it need not have noticed")
        if kinds <= OF_THE_LEADER and not poisoned and self.world.stats["workers declared lost"]:
            self.fail("a worker was declared lost, and only the leader had stood still")
        if kinds <= PROMPT and not poisoned and self._slow_ends:
            self.fail(f"{self._slow_ends[0]}, and nothing hindered it")

    def _alike(self, data: "Data") -> None:
        if not self.texts.alike:
            return
        for record in data.records.values():
            if record.state != RequestState.FINISHED:
                continue
            for choice, tokens in enumerate(record.journal):
                if tokens != self.texts.undisturbed(record.key, choice, self.specs[record.key].max_tokens):
                    self.fail(f"{record.key}: its text differs from that of an undisturbed run")


def in_flight_of(data: "Data", key: RequestKey) -> int:
    """Requests of the tenant that have not ended."""
    return sum(not record.ended for other, record in data.records.items() if tenant_of(other) == tenant_of(key))


def tenant_of(key: RequestKey) -> str:
    """Whose request it is."""
    return key.partition("/")[0]


def _journals(ends: list[Record]) -> list[tuple[str, tuple[tuple[int, ...], ...]]]:
    return [(record.state.value, record.journal) for record in ends]
