"""Lua does exactly what the pure protocol does: random histories go to both, and all that can be seen is compared."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from redis.asyncio import Redis

from gen.shoal.fleet.v1.request_pb2 import RequestPayload
from gen.shoal.inference.v1.inference_pb2 import Priority
from services.common.ids import RequestKey
from services.common.record import moves
from services.common.record.history import Held
from services.common.record.record import MAX_DECISIONS, Attempt
from services.common.record.states import RequestState
from services.common.record.transitions import Verdict
from services.common.store.recovery import Recovery
from tests.contract.builders import a_submit
from tests.contract.record_model import KEYS, WORKERS, World, ended_states

ANYTHING = (
    "submit", "place", "append", "finish", "requeue", "rebase", "cancel", "attach", "leave", "sweep", "restore",
    "recover", "together", "wait", "register", "lose", "elect",
)  # fmt: skip
ON_A_WORKER = (
    "append", "append", "together", "attach", "leave", "requeue", "rebase", "recover", "cancel", "finish", "wait",
    "sweep",
)  # fmt: skip
LIKELY: Mapping[RequestState | None, Sequence[str]] = {
    None: ("submit", "submit", "submit", "restore"),
    RequestState.QUEUED: ("place", "place", "place", "place", "attach", "leave", "recover", "wait", "sweep"),
    RequestState.PLACED: ON_A_WORKER,
    RequestState.RUNNING: ON_A_WORKER,
}
"""What keeps a history going, by the state in which the request is."""
DETAILS = ("", "why", "a|b", "two\nlines", "back\\slash\\n", "ünïcode")


@dataclass(frozen=True)
class Step:
    """What happens next, by small numbers: `_move` gives them meaning where the history then stands."""

    likely: bool
    """Take the step from LIKELY, for the first request that has not ended; else from ANYTHING, for any."""
    choice: int
    key: int
    numbers: tuple[int, int, int, int]
    odd: int
    """14: an older attempt, or another fence; 13: another nonce, or another fence; below: the ones that count."""


steps = st.builds(
    Step,
    likely=st.booleans(),
    choice=st.integers(0, 50),
    key=st.integers(0, len(KEYS) - 1),
    numbers=st.tuples(*[st.integers(0, 7)] * 4),
    odd=st.integers(0, 14),
)
histories = st.lists(steps, min_size=20, max_size=40)


@pytest.fixture(scope="module")
def run_id(runner: asyncio.Runner, store_client: Redis) -> str:
    run_id = runner.run(Recovery(store_client, "any").needed())
    assert run_id is not None
    return run_id


_worlds = count(1)


@settings(max_examples=250, deadline=None)
@given(history=histories)
def test_redis_and_the_pure_protocol_agree_on_every_history(
    runner: asyncio.Runner, store_client: Redis, run_id: str, history: list[Step]
) -> None:
    async def live() -> None:
        world = World(store_client, f"history-{next(_worlds)}")
        await world.begin(run_id)
        for step in history:
            await _happen(world, step)
        await world.compare_all()

    runner.run(live())


def test_a_decision_record_is_capped_but_has_its_end(runner: asyncio.Runner, store_client: Redis, run_id: str) -> None:
    async def live() -> None:
        world = World(store_client, "capped")
        await world.begin(run_id)
        await world.make(a_submit(KEYS[0]))
        for _ in range(MAX_DECISIONS + 5):
            await world.make(moves.Attach(KEYS[0], "gateway:2", ()))
        await world.make(moves.Place(KEYS[0], world.model.fence, world.model.records[KEYS[0]].attempt, WORKERS[0]))
        await world.make(moves.Cancel(KEYS[0], "enough"))
        attempt = world.model.records[KEYS[0]].attempt
        await world.make(moves.Finish(KEYS[0], attempt, RequestState.CANCELLED, ((0, (1, 2)),), b"outcome"))
        decisions = world.model.records[KEYS[0]].decisions
        assert (len(decisions), decisions[-1].what) == (MAX_DECISIONS + 1, "cancelled")

    runner.run(live())


async def _happen(world: World, step: Step) -> None:
    key = _key(world, step)
    record = world.model.records.get(key)
    state = None if record is None else record.state
    what = LIKELY.get(state, ANYTHING) if step.likely else ANYTHING
    await _do(world, what[step.choice % len(what)], key, step)


def _key(world: World, step: Step) -> RequestKey:
    if not step.likely:
        return KEYS[step.key]
    records = world.model.records
    return next((key for key in KEYS if key not in records or not records[key].ended), KEYS[-1])


async def _do(world: World, what: str, key: RequestKey, step: Step) -> None:
    a, b, _, _ = step.numbers
    match what:
        case "wait":
            _wait(world, key, a, b)
        case "register":
            await world.register(WORKERS[a % 3])
        case "lose":
            await world.lose(WORKERS[a % 3])
        case "elect":
            await world.elect("" if a == 0 else f"{a}:leader")
        case "together":
            others = [KEYS[(step.key + offset) % len(KEYS)] for offset in (0, a, b)]
            await world.make_together([_append(world, some, step) for some in (key, *others, key)])
        case _:
            answer = await world.make(_BUILDERS[what](world, key, step))
            if answer.verdict == Verdict.NO_WORKER:
                await world.register(WORKERS[a % 3])


def _wait(world: World, key: RequestKey, a: int, b: int) -> None:
    """Some time passes; or all until just before, at or after the moment when the request's time runs out."""
    model = world.model
    record = model.records.get(key)
    due_ms = 0
    if record is not None and b < 3:
        due_ms = record.deadline_at_ms
    elif record is not None and b < 6 and record.reader_left_at_ms:
        due_ms = record.reader_left_at_ms + record.resume_ms
    some_ms = a * (10_000 if b == 7 else 1)
    model.now_ms = max(model.now_ms, due_ms + a % 3 - 1 if due_ms else model.now_ms + some_ms)


def _fence(world: World, step: Step) -> str:
    return "99:somebody" if step.odd >= 13 else world.model.fence


def _attempt(world: World, key: RequestKey, step: Step) -> Attempt:
    record = world.model.records.get(key)
    attempt = Attempt(1, "n") if record is None else record.attempt
    if step.odd == 14:
        return Attempt(attempt.number - 1, attempt.nonce)
    return Attempt(attempt.number, "another") if step.odd == 13 else attempt


def _journal(world: World, key: RequestKey) -> tuple[tuple[int, ...], ...]:
    record = world.model.records.get(key)
    return record.journal if record is not None else ((),)


def _tokens(choice: int, start: int, length: int, variant: int) -> tuple[int, ...]:
    """What any two workers would generate, unless `variant` differs. Some tokens use all four bytes."""
    return tuple(choice * 1000 + index + (0xF0000000 if variant == 7 else 0) for index in range(start, start + length))


def _submit(world: World, key: RequestKey, step: Step) -> moves.Submit:
    a, b, c, d = step.numbers
    payload = RequestPayload(max_tokens=10 + a, priority=Priority.ValueType(b % 4), prompt_token_ids=range(c))
    return moves.Submit(
        key=key,
        digest="other" if d == 7 else "digest",
        payload=payload.SerializeToString(),
        num_choices=1 + b % 3,
        nonce=f"n{a}",
        gateway=f"gateway:{c}",
        resume_ms=10 * c,
        deadline_ms=0 if a < 5 else 20 * b,
        backlog_limit=2 + (7 - d),
        tenant_limit=max(0, c - 4),
        tokens_per_minute=(0, 0, 0, 40, 70, 100, 997, 0)[a],
        prompt_tokens=c,
        reserved_tokens=(1 + b % 3) * (10 + a),
    )


def _restore(world: World, key: RequestKey, step: Step) -> moves.Restore:
    a, b, c, d = step.numbers
    journal = tuple(_tokens(choice, 0, (c + choice) % 4, d) for choice in range(1 + b % 3))
    return moves.Restore(
        key=key,
        fence=_fence(world, step),
        digest="digest",
        payload=RequestPayload(max_tokens=5).SerializeToString(),
        num_choices=len(journal),
        nonce=f"r{a}",
        gateway="gateway:restored",
        reader=1 + a,
        resume_ms=10 * d,
        accepted_at_ms=world.model.now_ms - 5,
        deadline_at_ms=0 if a < 5 else world.model.now_ms + 10 * b,
        journal=journal,
        floor=1 + c,
    )


def _place(world: World, key: RequestKey, step: Step) -> moves.Place:
    return moves.Place(key, _fence(world, step), _attempt(world, key, step), WORKERS[step.numbers[0] % 3])


def _append(world: World, key: RequestKey, step: Step) -> moves.Append:
    a, b, c, d = step.numbers
    journal = _journal(world, key)
    choice = a % len(journal)
    start = max(0, len(journal[choice]) + (b % 5) - 3)
    return moves.Append(key, _attempt(world, key, step), choice, start, _tokens(choice, start, c, d))


def _finish(world: World, key: RequestKey, step: Step) -> moves.Finish:
    a, b, c, d = step.numbers
    tails = []
    for choice, tokens in enumerate(_journal(world, key)):
        start = max(0, len(tokens) + (1 if (a, choice) == (0, b % 3) else -(b % 3)))
        tails.append((start, _tokens(choice, start, (c + choice) % 8, d)))
    state = ended_states()[d % 4]
    return moves.Finish(key, _attempt(world, key, step), state, tuple(tails), b"\x00out\xff", DETAILS[a % 6])


def _requeue(world: World, key: RequestKey, step: Step) -> moves.Requeue:
    a, b, c, d = step.numbers
    fence = "" if a % 2 and step.odd < 13 else _fence(world, step)
    suspect_until = c if b > 3 else 0
    return moves.Requeue(
        key, _attempt(world, key, step), f"q{a}", DETAILS[b % 6], fence, floor=d, suspect_until=suspect_until
    )


def _rebase(world: World, key: RequestKey, step: Step) -> moves.Rebase:
    a, b, c, d = step.numbers
    lengths = [(a + b * choice) % 6 for choice in range(len(_journal(world, key)))]
    journal = tuple(_tokens(choice, 0, length, d) for choice, length in enumerate(lengths))
    return moves.Rebase(key, _attempt(world, key, step), f"b{c}", journal)


def _attach(world: World, key: RequestKey, step: Step) -> moves.Attach:
    a, b, c, d = step.numbers
    held = []
    for choice, tokens in enumerate((*_journal(world, key), ())[:b]):
        length = max(0, len(tokens) + a - 4 + choice)
        stated = min(length, c)
        held.append(Held(length, _tokens(choice, length - stated, stated, d)))
    return moves.Attach(key, f"gateway:{a}", tuple(held))


def _leave(world: World, key: RequestKey, step: Step) -> moves.Leave:
    record = world.model.records.get(key)
    reader = record.reader if record is not None else 1
    return moves.Leave(key, reader + {14: -1, 13: 2}.get(step.odd, 0))


def _cancel(world: World, key: RequestKey, step: Step) -> moves.Cancel:
    return moves.Cancel(key, DETAILS[step.numbers[0] % 6])


def _sweep(world: World, key: RequestKey, step: Step) -> moves.Sweep:
    return moves.Sweep(key, _fence(world, step))


def _recover(world: World, key: RequestKey, step: Step) -> moves.Recover:
    a, b, _, _ = step.numbers
    return moves.Recover(key, _fence(world, step), f"c{a}", floor=b)


_BUILDERS: Mapping[str, Callable[[World, RequestKey, Step], moves.Move]] = {
    "submit": _submit, "place": _place, "append": _append, "finish": _finish, "requeue": _requeue, "rebase": _rebase,
    "cancel": _cancel, "attach": _attach, "leave": _leave, "sweep": _sweep, "restore": _restore, "recover": _recover,
}  # fmt: skip
