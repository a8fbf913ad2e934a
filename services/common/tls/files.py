"""What one side of a connection has for TLS: files in PEM, read and checked at the start, and when they change."""

import os
import ssl
from dataclasses import dataclass, field, replace
from pathlib import Path

PathLike = str | os.PathLike[str]


class TlsError(ValueError):
    """A file that cannot be used. `name`: which: `ca`, `certificate` or `key`; the text begins behind that name."""

    def __init__(self, name: str, text: str) -> None:
        super().__init__(f"{name} {text}")
        self.name = name
        self.text = text


@dataclass(frozen=True, slots=True, kw_only=True)
class Tls:
    """Whom a side trusts, and what it shows.

    `ca`: certificates of the authorities that may have signed the other side's; None: those that gRPC brings along.
    `certificate` (with what leads up to the authority, if anything does) and `key`: this side's own; both or neither.
    Raises TlsError, which is a ValueError, for a file that is missing, unreadable or no PEM, for a key that is another
    certificate's, and for files that were changed while they were read.
    """

    ca: PathLike | None = None
    certificate: PathLike | None = None
    key: PathLike | None = None
    ca_pem: bytes | None = field(init=False, repr=False, compare=False)
    certificate_pem: bytes | None = field(init=False, repr=False, compare=False)
    key_pem: bytes | None = field(init=False, repr=False, compare=False)
    _versions: "tuple[_Version | None, ...]" = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_versions", self._versions_now())
        for name in ("ca", "certificate", "key"):
            path = getattr(self, name)
            object.__setattr__(self, f"{name}_pem", None if path is None else _read(name, path))
        if self.ca is not None:
            _check_ca(self.ca)
        if self.certificate is not None and self.key is not None:
            _check_pair(self.certificate, self.key, self.certificate_pem or b"", self.key_pem or b"")
        elif self.certificate is not None or self.key is not None:
            missing, given = ("key", "certificate") if self.key is None else ("certificate", "key")
            raise TlsError(missing, f"is missing, and the {given} is given: both are needed")
        if self._versions_now() != self._versions:
            # What was checked may be another file than what was read.
            raise TlsError("certificate", "or another file was changed while it was read")

    def renewed(self) -> "Tls":
        """Return these files as they are now: this object as long as none was changed. Raises TlsError."""
        return self if self._versions_now() == self._versions else replace(self)

    def _versions_now(self) -> "tuple[_Version | None, ...]":
        return tuple(_version(path) for path in (self.ca, self.certificate, self.key) if path is not None)


_Version = tuple[int, int, int]
"""Inode, time of the last change in ns, bytes: of what a link leads to, since Kubernetes changes files by a link."""


def _version(path: PathLike) -> _Version | None:
    try:
        found = os.stat(path)
    except OSError:
        return None  # reading it will say why
    return found.st_ino, found.st_mtime_ns, found.st_size


def _read(name: str, path: PathLike) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise TlsError(name, f"{os.fspath(path)} cannot be read: {error.strerror}") from error


def _check_ca(path: PathLike) -> None:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
    except ssl.SSLError as error:
        raise TlsError("ca", f"{os.fspath(path)} has no certificate in PEM: {_reason(error)}") from error


def _check_pair(certificate: PathLike, key: PathLike, certificate_pem: bytes, key_pem: bytes) -> None:
    certificate, key = os.fspath(certificate), os.fspath(key)
    if b"-----BEGIN CERTIFICATE-----" not in certificate_pem:
        raise TlsError("certificate", f"{certificate} has no certificate in PEM")
    if b"PRIVATE KEY-----" not in key_pem:
        raise TlsError("key", f"{key} has no private key in PEM")
    if b"ENCRYPTED" in key_pem:
        raise TlsError("key", f"{key} is encrypted: give one without a passphrase")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise TlsError("key", f"{key} does not match the certificate {certificate}") from error
        raise TlsError("certificate", f"{certificate} or its key cannot be used: {_reason(error)}") from error


def _reason(error: ssl.SSLError) -> str:
    return (error.reason or str(error)).replace("_", " ").lower()
