"""Options of the gateway."""

import ssl
from dataclasses import dataclass, replace

import grpc

from services.common import rpc
from services.common.config import ConfigError, option
from services.common.service_options import ServiceOptions
from services.common.tls.credentials import http_context, server_credentials
from services.common.tls.files import Tls, TlsError
from services.common.tls.options import flagged

MAX_UNSEEN_CALLS = 100_000
ANY_HOST = frozenset({"0.0.0.0", "[::]", "::", ""})


@dataclass(frozen=True, slots=True)
class GatewayConfig(ServiceOptions):
    """The fleet's public API for one pool: validation, admission, and streams to clients."""

    listen: str = option("127.0.0.1:0", "host:port that clients call; port 0: any free one")
    http_listen: str = option("127.0.0.1:0", "host:port for OpenAI-compatible HTTP; port 0: any free one")
    fleet_listen: str = option("127.0.0.1:0", "host:port that workers send tokens to; not for clients; port 0: any")
    fleet_address: str = option("", "host:port under which workers reach fleet_listen; empty: fleet_listen itself")
    public_tls_certificate: str = option(
        "", "PEM file: the certificate that clients see, in gRPC and HTTP; empty: --tls-certificate, if that is given"
    )
    public_tls_key: str = option("", "PEM file: the private key of --public-tls-certificate, without a passphrase")
    public_tls_client_ca: str = option(
        "", "PEM file: authorities, of which each client must show a certificate; empty: clients need none"
    )
    redis_url: str = option("redis://127.0.0.1:6379", "where Redis is")
    pool: str = option("smollm2-135m-instruct", "name of the pool, which is the model's name")
    require_keys: bool = option(False, "refuse callers without an API key of `shoal keys create`")
    tokenizers: str = option(..., "host:port of each tokenizer, separated by commas")
    tokenizer_timeout_ms: int = option(10_000, "longest wait for a tokenizer's answer, retries included", minimum=1)
    backlog_limit: int = option(500, "most requests waiting for a worker; more are refused", minimum=1)
    least_cache_tokens: int = option(
        0, "token slots of the smallest worker, taken until the pool has had one; 0: not known", minimum=0
    )
    http_max_body_bytes: int = option(
        512 * 1024, "largest HTTP body; reading one holds the event loop, at this size for up to 5 ms", minimum=1_024,
        maximum=16 * 1024 * 1024,
    )  # fmt: skip
    max_streams: int = option(5_000, "most open streams of this gateway; more are refused", minimum=1)
    max_connection_streams: int = option(5_000, "most open streams of one gRPC connection; more are refused", minimum=1)
    max_short_calls: int = option(
        1_000, "most calls in progress that do not stream (Cancel, GetRequest, ...); more are refused", minimum=1
    )
    max_message_bytes: int = option(
        rpc.MAX_MESSAGE_BYTES, "largest gRPC message of a client", minimum=64 * 1024, maximum=rpc.MAX_MESSAGE_BYTES
    )
    max_metadata_bytes: int = option(
        16 * 1024, "most bytes of a gRPC call's metadata", minimum=4 * 1024, maximum=1024 * 1024
    )
    resume_ms: int = option(300_000, "how long a request with the client's own id lives without a reader", minimum=0)
    anonymous_resume_ms: int = option(30_000, "the same for a request whose id the gateway drew", minimum=0)
    retention_ms: int = option(600_000, "how long an ended request is kept", minimum=1_000)
    start_limit_ms: int = option(60_000, "longest wait for Redis and a tokenizer at the start", minimum=0)
    drain_ms: int = option(10_000, "how long open streams may go on after SIGTERM", minimum=0)
    log_prompts: bool = option(False, "write prompts into the log, and texts of unforeseen errors, which may quote one")

    def __post_init__(self) -> None:
        ServiceOptions.__post_init__(self)
        if self.public_tls() is None and self.public_tls_client_ca:
            raise ConfigError("--public-tls-client-ca is given, and --public-tls-certificate is missing")

    def public_tls(self) -> Tls | None:
        """What clients see, and whose certificates they need (`ca`; None: they need none). None: all is plain."""
        certificate, key = self.public_tls_certificate, self.public_tls_key
        if not (certificate or key):
            certificate, key = self.tls_certificate, self.tls_key
        if not (certificate or key):
            return None
        files = flagged("--public-tls", certificate=certificate, key=key)
        if not self.public_tls_client_ca:
            return files
        try:
            return replace(files, ca=self.public_tls_client_ca)
        except TlsError as error:
            raise ConfigError(f"--public-tls-client-ca {error.text}") from error

    def client_options(self) -> tuple[tuple[str, int], ...]:
        """Limits of the gRPC port of clients that gRPC itself keeps; each is told with its number."""
        return (
            ("grpc.max_receive_message_length", self.max_message_bytes),
            ("grpc.max_metadata_size", self.max_metadata_bytes),
            ("grpc.absolute_max_metadata_size", self.max_metadata_bytes),
            # From 1,000 calls on that wait for the event loop, gRPC would reset some at random, without a status or
            # RetryInfo.
            ("grpc.server.max_pending_requests", MAX_UNSEEN_CALLS),
            ("grpc.server.max_pending_requests_hard_limit", MAX_UNSEEN_CALLS),
        )

    def client_credentials(self) -> grpc.ServerCredentials | None:
        """For the gRPC port of clients."""
        tls = self.public_tls()
        return server_credentials(tls, tls.ca is not None) if tls else None

    def http_context(self) -> ssl.SSLContext | None:
        """For the HTTP port."""
        tls = self.public_tls()
        return http_context(tls, tls.ca is not None) if tls else None

    def tokenizer_addresses(self) -> list[str]:
        """Addresses of all tokenizers. Raises ConfigError if there is none."""
        addresses = [address.strip() for address in self.tokenizers.split(",") if address.strip()]
        if not addresses:
            raise ConfigError(f"--tokenizers is {self.tokenizers!r}; expected at least one host:port")
        return addresses

    def advertised(self, listening: str) -> str:
        """Where workers reach the fleet's port. Raises ConfigError if nobody could know."""
        if not self.fleet_address and listening.rpartition(":")[0] in ANY_HOST:
            raise ConfigError(f"--fleet-listen is {self.fleet_listen}; then --fleet-address must say how to reach it")
        return self.fleet_address or listening
