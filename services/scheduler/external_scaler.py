"""KEDA's external scaler: every scheduler answers, leader or not, by the leader's last word in Redis.

A word that is too old is no word: the call fails, and KEDA then leaves the number of workers as it is. So neither a
pool without a leader nor a leader that was deposed ever scales anything down.
"""

import asyncio
from collections.abc import AsyncIterator

import grpc

from gen.keda import externalscaler_pb2 as keda
from gen.keda import externalscaler_pb2_grpc
from gen.shoal.fleet.v1.demand_pb2 import PoolDemand
from services.common.errors import Exhausted, InvalidRequest, Unavailable
from services.common.store.connection import StoreError
from services.common.store.demand import DemandStore

SERVICE_NAME = keda.DESCRIPTOR.services_by_name["ExternalScaler"].full_name
METRIC_NAME = "shoal_workers_wanted"
STALE_MS = 10_000
"""Longer than it takes a follower to lead; after a restart of Redis nothing is told until the pool is recovered."""
RETRY_AFTER_MS = 1_000
LOOK_S = 0.5
"""Between two looks of a stream."""
MAX_STREAMS = 64

Context = grpc.aio.ServicerContext[object, object]


class ExternalScaler(externalscaler_pb2_grpc.ExternalScalerServicer):
    """The RPCs of KEDA's ExternalScaler, for one pool; who asks makes no difference."""

    def __init__(self, store: DemandStore) -> None:
        self._store = store
        self._num_streams = 0

    async def IsActive(self, request: keda.ScaledObjectRef, context: Context) -> keda.IsActiveResponse:  # noqa: N802
        """Whether any worker is wanted. Raises Unavailable."""
        return _activity(await self._demand())

    async def StreamIsActive(  # noqa: N802
        self, request: keda.ScaledObjectRef, context: Context
    ) -> AsyncIterator[keda.IsActiveResponse]:
        """The same now and at each change; silent while it is not known. Raises Unavailable at first, and Exhausted."""
        if self._num_streams >= MAX_STREAMS:
            raise Exhausted(
                f"{self._num_streams} streams are open, the most is {MAX_STREAMS}; close one",
                reason="TOO_MANY_STREAMS",
                retry_after_ms=RETRY_AFTER_MS,
            )
        self._num_streams += 1
        try:
            told = _activity(await self._demand())
            yield told
            while True:
                await asyncio.sleep(LOOK_S)
                try:
                    now = _activity(await self._demand())
                except Unavailable:
                    continue
                if now != told:
                    told = now
                    yield told
        finally:
            self._num_streams -= 1

    async def GetMetricSpec(self, request: keda.ScaledObjectRef, context: Context) -> keda.GetMetricSpecResponse:  # noqa: N802
        """One metric, of which each worker is for 1."""
        spec = keda.MetricSpec(metricName=METRIC_NAME, targetSize=1, targetSizeFloat=1)
        return keda.GetMetricSpecResponse(metricSpecs=[spec])

    async def GetMetrics(self, request: keda.GetMetricsRequest, context: Context) -> keda.GetMetricsResponse:  # noqa: N802
        """How many workers are wanted. Raises Unavailable, InvalidRequest."""
        if request.metricName not in ("", METRIC_NAME):
            raise InvalidRequest(
                f"metricName is {request.metricName!r}; there is only {METRIC_NAME}",
                reason="INVALID_FIELD",
                field="metricName",
            )
        wanted = (await self._demand()).workers_wanted
        value = keda.MetricValue(metricName=METRIC_NAME, metricValue=wanted, metricValueFloat=wanted)
        return keda.GetMetricsResponse(metricValues=[value])

    async def _demand(self) -> PoolDemand:
        try:
            told = await self._store.read()
        except StoreError as error:
            raise _unavailable(f"the demand could not be read: {error}", "STORE_UNAVAILABLE") from error
        if told is None:
            raise _unavailable("no scheduler has led this pool yet, so its demand is not known", "NO_LEADER")
        if told.age_ms > STALE_MS:
            raise _unavailable(f"the leader's last word on demand is {told.age_ms} ms old: nobody leads", "NO_LEADER")
        return told.demand


def _activity(demand: PoolDemand) -> keda.IsActiveResponse:
    return keda.IsActiveResponse(result=demand.workers_wanted > 0)


def _unavailable(message: str, reason: str) -> Unavailable:
    return Unavailable(message, reason=reason, retry_after_ms=RETRY_AFTER_MS)
