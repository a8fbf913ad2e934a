"""Queued requests, workers and reports for tests of the scheduler."""

from gen.shoal.fleet.v1.request_pb2 import WorkerInfo, WorkerReport
from services.common.ids import RequestKey, TenantId, WorkerId
from services.common.record.record import Attempt
from services.common.store.intake import Queued
from services.scheduler.ledger import Reservation

W1, W2 = WorkerId("w-1"), WorkerId("w-2")


def a_queued(
    name: str = "r1",
    *,
    accepted_at_ms: int = 1000,
    attempt: int = 1,
    entry_id: str = "1-0",
    prompt_tokens: int = 5,
    max_tokens: int = 11,
) -> Queued:
    return Queued(
        entry_id=entry_id,
        key=RequestKey(f"acme/{name}"),
        attempt=Attempt(attempt, f"n{attempt}"),
        accepted_at_ms=accepted_at_ms,
        deadline_at_ms=0,
        prompt_tokens=prompt_tokens,
        generated_tokens=0,
        max_tokens=max_tokens,
        num_choices=1,
        priority=0,
        tenant=TenantId("acme"),
        suspect_until=0,
        traceparent=f"00-{name:0>32}-{1:016x}-00",
    )


def a_reservation(
    name: str = "r1", *, prompt_tokens: int = 5, max_tokens: int = 11, num_choices: int = 1, generated_tokens: int = 0
) -> Reservation:
    return Reservation(
        key=RequestKey(f"acme/{name}"),
        attempt=Attempt(1, "n1"),
        prompt_tokens=prompt_tokens,
        generated_tokens=generated_tokens,
        max_tokens=max_tokens,
        num_choices=num_choices,
        traceparent="",
    )


def an_info(
    worker: WorkerId = W1,
    *,
    num_blocks: int = 10,
    max_sequences: int = 4,
    max_prefill_tokens_per_step: int = 64,
    draining: bool = False,
    is_batch: bool = False,
) -> WorkerInfo:
    return WorkerInfo(
        worker_id=worker,
        num_blocks=num_blocks,
        block_size_tokens=16,
        max_sequences=max_sequences,
        max_prefill_tokens_per_step=max_prefill_tokens_per_step,
        draining=draining,
        is_batch=is_batch,
    )


def a_report(
    worker: WorkerId = W1, *, steps: int = 0, requests: int = 0, predicted_step_ms: int = 0, waiting_prefill: int = 0
) -> WorkerReport:
    return WorkerReport(
        worker_id=worker,
        steps=steps,
        requests=requests,
        predicted_step_ms=predicted_step_ms,
        waiting_prefill_tokens=waiting_prefill,
    )
