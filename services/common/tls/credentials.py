"""Credentials of gRPC and of HTTP, from files that were checked.

A port shows each new connection the files as they are then; connections that are open stay. A channel keeps the files
that it was opened with, since gRPC has no way to change them.
"""

import ssl

import grpc

from services.common.tls.files import Tls
from services.common.tls.options import FleetTls
from services.common.tls.renewal import Renewing


def channel_credentials(tls: Tls) -> grpc.ChannelCredentials:
    """For a side that dials."""
    return grpc.ssl_channel_credentials(tls.ca_pem, tls.key_pem, tls.certificate_pem)


def fleet_server_credentials(tls: FleetTls | None) -> grpc.ServerCredentials | None:
    """For a port that other services call. None: it is plain."""
    return server_credentials(tls.files, tls.require_client_certificate) if tls else None


def server_credentials(tls: Tls, require_client_certificate: bool) -> grpc.ServerCredentials:
    """For a port with this certificate. `require_client_certificate`: callers must show one of `tls.ca`; else none."""
    renewing, shown = Renewing(tls), tls

    def configuration() -> grpc.ServerCertificateConfiguration:
        pair = (shown.key_pem or b"", shown.certificate_pem or b"")
        return grpc.ssl_server_certificate_configuration([pair], shown.ca_pem if require_client_certificate else None)

    def at_connection() -> grpc.ServerCertificateConfiguration | None:
        """In a thread of gRPC; None: as before."""
        nonlocal shown
        files = renewing.now()
        if files is shown:
            return None
        shown = files
        return configuration()

    return grpc.dynamic_ssl_server_credentials(
        configuration(),
        at_connection,  # type: ignore[arg-type]  # the stub knows nothing of None
        require_client_certificate,
    )


def http_context(tls: Tls, require_client_certificate: bool) -> ssl.SSLContext:
    """The same for HTTP: TLS 1.2 or newer."""
    renewing, shown = Renewing(tls), tls
    first = current = _http_context(tls, require_client_certificate)

    def at_connection(connection: ssl.SSLObject, _name: str | None, _context: ssl.SSLContext) -> None:
        nonlocal shown, current
        files = renewing.now()
        if files is not shown:
            current = _http_context(files, require_client_certificate)
            shown = files
        connection.context = current

    # Called for each connection, whether it says a name or not: what it hears of names is not used.
    first.sni_callback = at_connection
    return first


def _http_context(tls: Tls, require_client_certificate: bool) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    assert tls.certificate is not None
    context.load_cert_chain(tls.certificate, tls.key)
    if require_client_certificate:
        assert tls.ca_pem is not None
        context.load_verify_locations(cadata=tls.ca_pem.decode())
        context.verify_mode = ssl.CERT_REQUIRED
    return context
