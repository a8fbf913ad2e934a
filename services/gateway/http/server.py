"""The HTTP server: beside gRPC, in the same process and on the same event loop, over the same core."""

import ssl

from aiohttp import web

from services.common.rpc import host_and_port
from services.gateway.http.endpoints import Endpoints
from services.gateway.http.errors import answered

KEEP_ALIVE_S = 75.0
MAX_WAITING_CONNECTIONS = 4096
"""That the event loop has not taken yet: as many as Linux allows by default. aiohttp's 128 are soon full when many
clients come at once, and then the kernel drops their packets, which they send again after 1 s and 3 s."""
STOP_S = 1.0
"""How long a response that has its end may still be written when the server stops."""


class HttpServer:
    """Serves the endpoints at one address."""

    def __init__(self, endpoints: Endpoints) -> None:
        application = web.Application(middlewares=[answered])
        application.add_routes(
            [
                web.post("/v1/chat/completions", endpoints.chat_completions),
                web.post("/v1/completions", endpoints.completions),
                web.get("/v1/models", endpoints.models),
                web.get("/v1/models/{model:.+}", endpoints.model),
                web.get("/health", endpoints.health),
            ]
        )
        self._runner = web.AppRunner(
            application,
            access_log=None,
            # A client that hangs up ends its handler.
            handler_cancellation=True,
            # A small body shall not become a large one.
            auto_decompress=False,
            keepalive_timeout=KEEP_ALIVE_S,
            shutdown_timeout=STOP_S,
        )

    async def start(self, listen: str, tls: ssl.SSLContext | None) -> str:
        """Listen on `host:port` (port 0: any) and serve; `tls`: None: in plain. Returns the address.

        Raises OSError if the port is taken.
        """
        host, port = host_and_port(listen)
        await self._runner.setup()
        try:
            await web.TCPSite(
                self._runner, host.strip("[]") or None, port, ssl_context=tls, backlog=MAX_WAITING_CONNECTIONS
            ).start()
        except OSError as error:
            raise OSError(f"can't listen on {listen}: {error.strerror}. Choose another port, or 0 for any") from error
        return f"{host}:{self._runner.addresses[0][1]}"

    async def stop(self) -> None:
        """Close the port and every connection."""
        await self._runner.cleanup()
