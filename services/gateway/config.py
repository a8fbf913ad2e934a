"""Options of the gateway."""

from dataclasses import dataclass

from services.common.config import ConfigError, option

ANY_HOST = frozenset({"0.0.0.0", "[::]", "::", ""})


@dataclass(frozen=True, slots=True)
class GatewayConfig:
    """The fleet's public API for one pool: validation, admission, and streams to clients."""

    listen: str = option("127.0.0.1:0", "host:port that clients call; port 0: any free one")
    http_listen: str = option("127.0.0.1:0", "host:port for OpenAI-compatible HTTP; port 0: any free one")
    fleet_listen: str = option("127.0.0.1:0", "host:port that workers send tokens to; not for clients; port 0: any")
    fleet_address: str = option("", "host:port under which workers reach fleet_listen; empty: fleet_listen itself")
    redis_url: str = option("redis://127.0.0.1:6379", "where Redis is")
    pool: str = option("smollm2-135m-instruct", "name of the pool, which is the model's name")
    tokenizers: str = option(..., "host:port of each tokenizer, separated by commas")
    tokenizer_timeout_ms: int = option(10_000, "longest wait for a tokenizer's answer, retries included", minimum=1)
    backlog_limit: int = option(500, "most requests waiting for a worker; more are refused", minimum=1)
    http_max_body_bytes: int = option(
        512 * 1024, "largest HTTP body; reading one holds the event loop, at this size for up to 5 ms", minimum=1_024,
        maximum=16 * 1024 * 1024,
    )  # fmt: skip
    max_streams: int = option(5_000, "most open streams of this gateway; more are refused", minimum=1)
    resume_ms: int = option(300_000, "how long a request with the client's own id lives without a reader", minimum=0)
    anonymous_resume_ms: int = option(30_000, "the same for a request whose id the gateway drew", minimum=0)
    retention_ms: int = option(600_000, "how long an ended request is kept", minimum=1_000)
    start_limit_ms: int = option(60_000, "longest wait for Redis and a tokenizer at the start", minimum=0)
    drain_ms: int = option(10_000, "how long open streams may go on after SIGTERM", minimum=0)
    metrics_port: int = option(
        0, "port of Prometheus metrics, at the host of --listen; 0: none", minimum=0, maximum=65535
    )
    otlp_endpoint: str = option("", "http://host:port of an OTLP receiver (gRPC) for traces; empty: none")
    log_level: str = option("INFO", "DEBUG, INFO, WARNING or ERROR")

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
