"""The flags that every service has."""

from dataclasses import dataclass
from typing import Literal

from services.common.config import option
from services.common.tls.options import TlsOptions


@dataclass(frozen=True, slots=True)
class ServiceOptions(TlsOptions):
    """Base of the services' configurations: what they tell of themselves, and TLS between them."""

    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = option("INFO", "DEBUG, INFO, WARNING or ERROR")
    metrics_port: int = option(
        0, "port of Prometheus metrics, at the host of --listen; 0: none", minimum=0, maximum=65535
    )
    otlp_endpoint: str = option("", "http://host:port of an OTLP receiver (gRPC) for traces; empty: none")
