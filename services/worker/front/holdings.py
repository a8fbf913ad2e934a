"""After Redis came back without its last writes: what this worker still holds."""

import asyncio

from gen.shoal.fleet.v1 import request_pb2
from gen.shoal.inference.v1 import inference_pb2
from services.common.store.connection import StoreUnavailable
from services.common.store.recovery import Recovery
from services.common.store.workers import WorkerDirectory
from services.worker.config import WorkerConfig
from services.worker.front.session import Session

POLL_S = 0.3


class HoldingsPoster:
    """Posts a session's requests while a recovery is on, so that the leader can go above their attempts."""

    def __init__(
        self, session: Session, info: request_pb2.WorkerInfo, recovery: Recovery, directory: WorkerDirectory,
        config: WorkerConfig,
    ) -> None:  # fmt: skip
        self._session = session
        self._info = info
        self._recovery = recovery
        self._directory = directory
        self._config = config

    async def run(self) -> None:
        """Watch for as long as the session lives."""
        while True:
            try:
                run_id = await self._recovery.needed()
                if run_id is not None:
                    await self._directory.register(self._info, self._config.registration_ttl_ms)
                    await self._recovery.post(self._holdings(), run_id)
                    for active in self._session.active.values():
                        active.announced = False
            except StoreUnavailable:
                pass  # Asked again below.
            await asyncio.sleep(POLL_S)

    def _holdings(self) -> request_pb2.Holdings:
        return request_pb2.Holdings(
            holder=self._session.worker,
            requests=[
                request_pb2.HeldRequest(
                    key=active.run.key,
                    attempt=active.run.attempt.number,
                    nonce=active.run.attempt.nonce,
                    choices=[inference_pb2.TokenIds(ids=known) for known in active.run.known],
                    runs_here=True,
                )
                for active in self._session.active.values()
            ],
        )
