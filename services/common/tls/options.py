"""The flags for TLS between the services of a fleet, which every service has."""

from dataclasses import dataclass, field

from services.common.config import ConfigError, option
from services.common.tls.files import Tls, TlsError
from services.common.tls.renewal import Renewing


@dataclass(frozen=True, slots=True)
class FleetTls:
    """How a process speaks with the other services of its fleet."""

    files: Tls
    """All three, as they were at the start."""
    require_client_certificate: bool
    """Whether who calls this process must show a certificate of the fleet's authority."""
    server_name: str
    """The name that certificates of those it calls must have; empty: the host that is dialled."""
    renewing: Renewing = field(init=False, repr=False, compare=False)
    """What a new channel is opened with."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "renewing", Renewing(self.files))


@dataclass(frozen=True, slots=True)
class TlsOptions:
    """Files are checked when it is made: raises ConfigError."""

    tls_certificate: str = option("", "PEM file: this service's certificate; with key and CA: TLS between services")
    tls_key: str = option("", "PEM file: the private key of --tls-certificate, without a passphrase")
    tls_ca: str = option("", "PEM file: the authorities that sign certificates of this fleet's services")
    tls_require_client_certificate: bool = option(
        True, "whether services that call this one must show a certificate of --tls-ca"
    )
    tls_server_name: str = option("", "name in the certificates of services that this one calls; empty: their host")

    def __post_init__(self) -> None:
        given = {flag: bool(getattr(self, name)) for name, flag in _FLAGS.items()}
        if any(given.values()) and not all(given.values()):
            missing = ", ".join(flag for flag, is_given in given.items() if not is_given)
            raise ConfigError(f"{missing} is missing: TLS between services takes all of {', '.join(_FLAGS.values())}")
        self.fleet_tls()

    @property
    def tls_files(self) -> Tls | None:
        """What Redis is shown, and by whom its certificate must be signed, unless its URL says otherwise."""
        tls = self.fleet_tls()
        return tls.files if tls else None

    def fleet_tls(self) -> FleetTls | None:
        """TLS between services; None: they speak in plain."""
        if not self.tls_certificate:
            return None
        files = flagged("--tls", ca=self.tls_ca, certificate=self.tls_certificate, key=self.tls_key)
        return FleetTls(files, self.tls_require_client_certificate, self.tls_server_name)


_FLAGS = {"tls_certificate": "--tls-certificate", "tls_key": "--tls-key", "tls_ca": "--tls-ca"}


def flagged(prefix: str, *, certificate: str, key: str, ca: str = "") -> Tls:
    """Files that flags `<prefix>-...` name; an empty one is none. Raises ConfigError that names the flag."""
    try:
        return Tls(ca=ca or None, certificate=certificate or None, key=key or None)
    except TlsError as error:
        raise ConfigError(f"{prefix}-{error.name} {error.text}") from error
