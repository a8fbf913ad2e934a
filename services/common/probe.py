"""Asks the service in this container whether it serves: `python -m services.common.probe`. Status 0 if it does.

The image's health check, and a pod's where a kubelet's own speaks no TLS. It reads where the service listens, and its
TLS files, from the same variables as the service does: SHOAL_LISTEN, SHOAL_TLS_CA, ... So it shows the service's own
certificate.
"""

import sys
from dataclasses import dataclass

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.common.config import option, parse
from services.common.tls.credentials import channel_credentials
from services.common.tls.files import Tls
from services.common.tls.options import TlsOptions, flagged

_EVERY_ADDRESS = ("0.0.0.0", "[::]", "")


@dataclass(frozen=True, slots=True)
class ProbeConfig(TlsOptions):
    """Asks a service for its gRPC health."""

    listen: str = option(..., "host:port that the service listens on")
    health_name: str = option("", "what is asked for: empty: whether it takes work; live: whether it lives")
    probe_timeout_ms: int = option(3_000, "longest wait for its answer", minimum=1)

    public_tls_certificate: str = option("", "a gateway's certificate for clients, if it has one of its own")
    public_tls_ca: str = option("", "PEM file: who signed --public-tls-certificate; empty: well-known authorities")

    def __post_init__(self) -> None:
        TlsOptions.__post_init__(self)
        self.asking_tls()

    def asking_tls(self) -> Tls | None:
        """How the port that clients call is asked; None: in plain."""
        if self.public_tls_certificate:
            return flagged("--public-tls", ca=self.public_tls_ca, certificate="", key="")
        return self.tls_files

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
                health_pb2.HealthCheckRequest(service=config.health_name), timeout=config.probe_timeout_ms / 1000
            )
        except grpc.RpcError as error:
            sys.exit(f"nobody serves at {config.target}: {error.code().name}, {error.details()}")
    if answer.status != health_pb2.HealthCheckResponse.SERVING:
        sys.exit(f"{config.target} is {health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)}")


def _channel(config: ProbeConfig) -> grpc.Channel:
    tls = config.asking_tls()
    if tls is None:
        return grpc.insecure_channel(config.target)
    name = config.tls_server_name
    options = [("grpc.ssl_target_name_override", name)] if name else []
    return grpc.secure_channel(config.target, channel_credentials(tls), options=options)


if __name__ == "__main__":
    main()
