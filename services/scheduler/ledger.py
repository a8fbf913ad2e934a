"""What the leader has promised of each worker: blocks, sequences, and prefill to come.

A request reserves the blocks that it can need at most, on the worker that it is placed on, from its placement until
Redis says that it left. So workers never run short by what the leader places, and no scraped metric is needed.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from gen.shoal.fleet.v1.request_pb2 import StepTime, WorkerInfo, WorkerReport
from services.common.blocks import blocks_of_request
from services.common.ids import RequestKey, WorkerId
from services.common.record.record import Attempt
from services.common.store.inbox import Outstanding
from services.common.store.intake import Queued

CREDIT_STEPS = 2
"""Steps of prefill that a worker may have before it: enough that no way through Redis idles it, and no more, so that
the order of the queue is decided late. One of batch work orders what it has by itself, and may have any number."""


class OverCommittedError(Exception):
    """A defect: a reservation was made that the worker had no room for."""


@dataclass(frozen=True, slots=True)
class Reservation:
    """What one attempt at a request needs of its worker."""

    key: RequestKey
    attempt: Attempt
    prompt_tokens: int
    generated_tokens: int
    """Under earlier attempts, over all choices: computed again like the prompt."""
    max_tokens: int
    """Most generated tokens of a choice, earlier ones included."""
    num_choices: int
    """Each is a sequence."""
    traceparent: str

    @classmethod
    def of(cls, request: Queued | Outstanding) -> "Reservation":
        """What a request reserves that waits, or that a worker has. A suspect needs no more: it runs alone there."""
        return cls(
            key=request.key,
            attempt=request.attempt,
            prompt_tokens=request.prompt_tokens,
            generated_tokens=request.generated_tokens,
            max_tokens=request.max_tokens,
            num_choices=request.num_choices,
            traceparent=request.traceparent,
        )

    @property
    def prefill_tokens(self) -> int:
        """What is to be computed before anything is generated."""
        return self.prompt_tokens + self.generated_tokens

    def num_blocks(self, block_size_tokens: int) -> int:
        """Blocks needed at most."""
        return blocks_of_request(self.prompt_tokens, self.max_tokens, self.num_choices, block_size_tokens)


class Account:
    """One worker's reservations and credit. Changed only by the ledger."""

    def __init__(self, info: WorkerInfo) -> None:
        self.info = info
        self.num_reserved_blocks = 0
        self.num_sequences = 0
        self._reservations: dict[RequestKey, Reservation] = {}  # in the order of placement
        self._untaken: dict[RequestKey, Reservation] = {}  # the last of these, not yet in the worker's report
        self._untaken_prefill_tokens = 0
        self.report = WorkerReport(worker_id=info.worker_id)
        """The last one; an empty one before it."""

    @property
    def worker(self) -> WorkerId:
        """Whose account it is."""
        return WorkerId(self.info.worker_id)

    @property
    def num_free_blocks(self) -> int:
        """Blocks that nothing placed can need."""
        return self.info.num_blocks - self.num_reserved_blocks

    @property
    def prefill_backlog_tokens(self) -> int:
        """Prompt tokens not yet computed: those reported, and those of requests placed since that report."""
        return self.report.waiting_prefill_tokens + self._untaken_prefill_tokens

    @property
    def step_time(self) -> StepTime | None:
        """What its steps take; None: it has made none."""
        return self.report.step_time if self.report.HasField("step_time") else None

    @property
    def idle(self) -> bool:
        """Nothing is placed here."""
        return not self._reservations

    @property
    def reservations(self) -> Mapping[RequestKey, Reservation]:
        """What is placed here, in the order of placement."""
        return self._reservations

    def could_hold(self, reservation: Reservation) -> bool:
        """Whether it fits an empty worker like this one, and the worker takes new requests at all."""
        return not self.info.draining and reservation.num_blocks(self.info.block_size_tokens) <= self.info.num_blocks

    def grants(self, reservation: Reservation) -> bool:
        """Whether there is room now. An idle worker is granted whatever it could hold: nothing waits for ever."""
        if not self.could_hold(reservation):
            return False
        if self.idle:
            return True
        return (
            reservation.num_blocks(self.info.block_size_tokens) <= self.num_free_blocks
            and self.num_sequences + reservation.num_choices <= self.info.max_sequences
            and self._has_credit
        )

    @property
    def _has_credit(self) -> bool:
        """Whether it may have further prompts before it."""
        most_tokens = CREDIT_STEPS * self.info.max_prefill_tokens_per_step
        return self.info.is_batch or self.prefill_backlog_tokens < most_tokens

    def add(self, reservation: Reservation) -> None:
        """Count a reservation; one of the same request is replaced."""
        self.remove(reservation.key)
        self._reservations[reservation.key] = reservation
        self.num_reserved_blocks += reservation.num_blocks(self.info.block_size_tokens)
        self.num_sequences += reservation.num_choices
        self._untaken[reservation.key] = reservation
        self._untaken_prefill_tokens += reservation.prefill_tokens

    def remove(self, key: RequestKey) -> Reservation | None:
        """Forget a reservation and return it. None: there is none."""
        reservation = self._reservations.pop(key, None)
        if reservation is None:
            return None
        self.num_reserved_blocks -= reservation.num_blocks(self.info.block_size_tokens)
        self.num_sequences -= reservation.num_choices
        if self._untaken.pop(key, None) is not None:
            self._untaken_prefill_tokens -= reservation.prefill_tokens
        return reservation

    def reported(self, report: WorkerReport) -> None:
        """Take the worker's word for its prefill, and for how many requests it has taken from its inbox."""
        self.report = report
        # Workers take requests in the order of placement: those that the number does not cover are the last ones.
        for key in list(self._untaken)[: max(0, report.requests - self._num_taken)]:
            self._untaken_prefill_tokens -= self._untaken.pop(key).prefill_tokens

    @property
    def _num_taken(self) -> int:
        return len(self._reservations) - len(self._untaken)


class Ledger:
    """The accounts of all workers. Changed only by the leader's task."""

    def __init__(self) -> None:
        self._accounts: dict[WorkerId, Account] = {}

    @property
    def accounts(self) -> Mapping[WorkerId, Account]:
        """Of each worker that is known."""
        return self._accounts

    def open(self, info: WorkerInfo, outstanding: Iterable[Reservation] = ()) -> None:
        """Know a worker, with what its inbox holds, in that order; or learn that it drains now."""
        account = self._accounts.get(WorkerId(info.worker_id))
        if account is not None:
            account.info = info
            return
        account = self._accounts[WorkerId(info.worker_id)] = Account(info)
        for reservation in outstanding:
            account.add(reservation)

    def close(self, worker: WorkerId) -> None:
        """Forget a worker and all that is reserved on it."""
        self._accounts.pop(worker, None)

    def reserve(self, worker: WorkerId, reservation: Reservation) -> None:
        """Count a request that was placed. Raises OverCommittedError if the worker had no room for it."""
        account = self._accounts[worker]
        if not account.grants(reservation):
            raise OverCommittedError(f"{reservation} on {worker} with {account.num_free_blocks} free blocks")
        account.add(reservation)

    def take(self, worker: WorkerId, reservation: Reservation) -> None:
        """Count a request that the worker has already, whether or not there was room for it."""
        account = self._accounts[worker]
        known = account.reservations.get(reservation.key)
        if known is None or known.attempt != reservation.attempt:
            account.add(reservation)

    def release(self, worker: WorkerId, key: RequestKey) -> bool:
        """A request left its worker. False: nothing was reserved for it there."""
        account = self._accounts.get(worker)
        return account is not None and account.remove(key) is not None

    def reported(self, report: WorkerReport) -> None:
        """Take in a worker's report; an unknown worker's is ignored."""
        account = self._accounts.get(WorkerId(report.worker_id))
        if account is not None:
            account.reported(report)

    def holdings(self) -> Iterator[tuple[WorkerId, Reservation]]:
        """All reservations. The ledger may not be changed meanwhile."""
        for worker, account in self._accounts.items():
            for reservation in account.reservations.values():
                yield worker, reservation
