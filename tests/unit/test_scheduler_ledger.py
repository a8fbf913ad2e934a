"""The ledger never promises more than a worker has, never forgets what it promised, and binds late."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from services.scheduler.ledger import CREDIT_STEPS, Ledger, OverCommittedError
from tests.unit.scheduler_builders import W1, W2, a_report, a_reservation, an_info


def a_ledger(**info: int) -> Ledger:
    ledger = Ledger()
    ledger.open(an_info(W1, **info))  # type: ignore[arg-type]
    return ledger


def test_a_request_reserves_whole_blocks_for_each_of_its_choices() -> None:
    assert a_reservation(prompt_tokens=16, max_tokens=16).num_blocks(16) == 2
    assert a_reservation(prompt_tokens=16, max_tokens=17).num_blocks(16) == 3
    assert a_reservation(prompt_tokens=16, max_tokens=17, num_choices=4).num_blocks(16) == 12
    # The two full blocks in front of the prompt's last token are shared by all choices.
    assert a_reservation(prompt_tokens=33, max_tokens=15, num_choices=4).num_blocks(16) == 2 + 4


def test_what_was_generated_before_is_prefill_but_no_further_memory() -> None:
    continued = a_reservation(prompt_tokens=10, max_tokens=20, generated_tokens=15)
    assert continued.prefill_tokens == 25
    assert continued.num_blocks(16) == a_reservation(prompt_tokens=10, max_tokens=20).num_blocks(16)


def test_room_ends_with_the_blocks() -> None:
    ledger = a_ledger(num_blocks=3)
    ledger.reserve(W1, a_reservation("a", max_tokens=27))
    assert not ledger.accounts[W1].grants(a_reservation("b", max_tokens=27))
    assert ledger.accounts[W1].grants(a_reservation("b"))


def test_room_ends_with_the_sequences_of_a_step() -> None:
    ledger = a_ledger(max_sequences=2)
    ledger.reserve(W1, a_reservation("a"))
    assert not ledger.accounts[W1].grants(a_reservation("b", num_choices=2))
    ledger.reserve(W1, a_reservation("b"))
    assert not ledger.accounts[W1].grants(a_reservation("c"))


def test_room_ends_with_two_steps_of_prefill() -> None:
    ledger = a_ledger(num_blocks=1000, max_prefill_tokens_per_step=10, max_sequences=99)
    for number in range(CREDIT_STEPS):
        ledger.reserve(W1, a_reservation(f"r{number}", prompt_tokens=10))
    assert not ledger.accounts[W1].grants(a_reservation("more"))
    # Both were taken, and one of them is computed.
    ledger.reported(a_report(requests=2, waiting_prefill=10))
    assert ledger.accounts[W1].grants(a_reservation("more"))


def test_a_worker_for_batch_work_has_room_for_prompts_as_long_as_it_has_for_sequences() -> None:
    ledger = a_ledger(num_blocks=1000, max_prefill_tokens_per_step=10, max_sequences=9, is_batch=True)
    for number in range(9):
        assert ledger.accounts[W1].grants(a_reservation(f"r{number}", prompt_tokens=100))
        ledger.reserve(W1, a_reservation(f"r{number}", prompt_tokens=100))
    assert not ledger.accounts[W1].grants(a_reservation("more"))


def test_a_report_does_not_cover_what_the_worker_has_not_taken_yet() -> None:
    ledger = a_ledger(num_blocks=1000, max_prefill_tokens_per_step=100, max_sequences=99)
    ledger.reserve(W1, a_reservation("a", prompt_tokens=50))
    ledger.reserve(W1, a_reservation("b", prompt_tokens=30))
    ledger.reported(a_report(requests=1, waiting_prefill=50))
    assert ledger.accounts[W1].prefill_backlog_tokens == 50 + 30


def test_an_idle_worker_is_granted_a_prompt_of_any_length() -> None:
    ledger = a_ledger(num_blocks=1000, max_prefill_tokens_per_step=1)
    ledger.reported(a_report(waiting_prefill=500))
    assert ledger.accounts[W1].grants(a_reservation(prompt_tokens=900, num_choices=8))


def test_what_never_fits_is_never_granted() -> None:
    ledger = a_ledger(num_blocks=2)
    never = a_reservation(prompt_tokens=33)
    assert not ledger.accounts[W1].could_hold(never)
    assert not ledger.accounts[W1].grants(never)
    with pytest.raises(OverCommittedError):
        ledger.reserve(W1, never)


def test_a_draining_worker_is_granted_nothing_and_keeps_what_it_has() -> None:
    ledger = a_ledger()
    ledger.reserve(W1, a_reservation("a"))
    ledger.open(an_info(W1, draining=True))
    assert not ledger.accounts[W1].grants(a_reservation("b"))
    assert [held.key for _, held in ledger.holdings()] == ["acme/a"]


def test_a_new_leader_counts_what_an_inbox_holds() -> None:
    ledger = Ledger()
    ledger.open(an_info(W1), [a_reservation("a"), a_reservation("b")])
    assert ledger.accounts[W1].num_free_blocks == 8
    assert ledger.accounts[W1].num_sequences == 2


NAMES = st.sampled_from([f"r{number}" for number in range(8)])
WORKERS = st.sampled_from([W1, W2])


class LedgerOperations(RuleBasedStateMachine):
    """Random reservations and releases, against a plain set."""

    @initialize()
    def begin(self) -> None:
        self.ledger = Ledger()
        self.ledger.open(an_info(W1, num_blocks=12, max_sequences=4))
        self.ledger.open(an_info(W2, num_blocks=5, max_sequences=2))
        self.model: dict[tuple[str, str], int] = {}

    @rule(worker=WORKERS, name=NAMES, prompt=st.integers(1, 120), tokens=st.integers(1, 120), choices=st.integers(1, 3))
    def reserve(self, worker: str, name: str, prompt: int, tokens: int, choices: int) -> None:
        reservation = a_reservation(name, prompt_tokens=prompt, max_tokens=tokens, num_choices=choices)
        account = self.ledger.accounts[W1 if worker == W1 else W2]
        if (worker, reservation.key) in self.model:
            return
        if account.grants(reservation):
            self.ledger.reserve(account.worker, reservation)
            self.model[worker, reservation.key] = reservation.num_blocks(16)
        else:
            with pytest.raises(OverCommittedError):
                self.ledger.reserve(account.worker, reservation)

    @rule(worker=WORKERS, name=NAMES)
    def release(self, worker: str, name: str) -> None:
        key = a_reservation(name).key
        was_known = self.model.pop((worker, key), None) is not None
        assert self.ledger.release(W1 if worker == W1 else W2, key) == was_known

    @rule(worker=WORKERS, requests=st.integers(0, 9), waiting=st.integers(0, 300))
    def report(self, worker: str, requests: int, waiting: int) -> None:
        self.ledger.reported(a_report(W1 if worker == W1 else W2, requests=requests, waiting_prefill=waiting))

    @invariant()
    def nothing_is_over_committed_and_nothing_leaks(self) -> None:
        for account in self.ledger.accounts.values():
            blocks = [num for (worker, _), num in self.model.items() if worker == account.worker]
            assert account.num_reserved_blocks == sum(blocks) <= account.info.num_blocks
            assert account.idle == (not blocks)
            assert account.prefill_backlog_tokens >= 0
            if account.idle:
                assert account.num_sequences == account.num_reserved_blocks == 0


LedgerOperations.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestLedgerOperations = LedgerOperations.TestCase
