"""Asks the service in this container whether it serves: `python -m services.common.probe`. Status 0 if it does.

The image's health check. It reads where and how the service listens from the same variables as the service:
SHOAL_LISTEN, and those of TLS. The certificate must then be of `--tls-ca`, for 127.0.0.1 or `--tls-server-name`.
"""

import sys
from dataclasses import dataclass

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.common.config import option, parse
from services.common.tls.credentials import channel_credentials
from services.common.tls.options import TlsOptions

_EVERY_ADDRESS = ("0.0.0.0", "[::]", "")


@dataclass(frozen=True, slots=True)
class ProbeConfig(TlsOptions):
    """Asks a service for its gRPC health."""

    listen: str = option(..., "host:port that the service listens on")
    probe_timeout_ms: int = option(3_000, "longest wait for its answer", minimum=1)

    @property
    def target(self) -> str:
        """Where to call: a service that listens on every address is reached on loopback."""
        host, _, port = self.listen.rpartition(":")
        return f"127.0.0.1:{port}" if host in _EVERY_ADDRESS else self.listen


def main() -> None:
    """Ask once; what is wrong is one line on standard error."""
    config = parse(ProbeConfig, "common.probe").config
    with _channel(config) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(), timeout=config.probe_timeout_ms / 1000
            )
        except grpc.RpcError as error:
            sys.exit(f"nobody serves at {config.target}: {error.code().name}, {error.details()}")
    if answer.status != health_pb2.HealthCheckResponse.SERVING:
        sys.exit(f"{config.target} is {health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)}")


def _channel(config: ProbeConfig) -> grpc.Channel:
    tls = config.fleet_tls()
    if tls is None:
        return grpc.insecure_channel(config.target)
    name = [("grpc.ssl_target_name_override", tls.server_name)] if tls.server_name else []
    return grpc.secure_channel(config.target, channel_credentials(tls.files), name)


if __name__ == "__main__":
    main()
