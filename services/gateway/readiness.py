"""Whether this gateway should be sent work, as its health tells."""

import logging

from services.common.rpc import Server

logger = logging.getLogger(__name__)


class Readiness:
    """Collects causes not to serve; health is SERVING while there is none."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._causes: set[str] = set()

    @property
    def causes(self) -> frozenset[str]:
        """Why not to serve; none: it should be sent work."""
        return frozenset(self._causes)

    async def unready(self, cause: str) -> None:
        """Something that is needed is away."""
        if cause not in self._causes:
            self._causes.add(cause)
            logger.warning("not ready", extra={"cause": cause})
            await self._server.set_serving(False)

    async def ready(self, cause: str) -> None:
        """It is back."""
        if cause in self._causes:
            self._causes.remove(cause)
            if not self._causes:
                logger.info("ready")
                await self._server.set_serving(True)
