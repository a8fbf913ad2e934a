"""Credentials of gRPC and of HTTP, from files that were checked."""

import ssl

import grpc

from services.common.tls.files import Tls
from services.common.tls.options import FleetTls


def channel_credentials(tls: Tls) -> grpc.ChannelCredentials:
    """For a side that dials."""
    return grpc.ssl_channel_credentials(tls.ca_pem, tls.key_pem, tls.certificate_pem)


def fleet_server_credentials(tls: FleetTls | None) -> grpc.ServerCredentials | None:
    """For a port that other services call. None: it is plain."""
    if tls is None:
        return None
    return server_credentials(tls.files, tls.files.ca_pem if tls.require_client_certificate else None)


def server_credentials(tls: Tls, client_ca_pem: bytes | None) -> grpc.ServerCredentials:
    """For a port with this certificate. `client_ca_pem`: callers must show a certificate of these; None: none."""
    pair = (tls.key_pem or b"", tls.certificate_pem or b"")
    return grpc.ssl_server_credentials([pair], client_ca_pem, require_client_auth=client_ca_pem is not None)


def http_context(tls: Tls, client_ca_pem: bytes | None) -> ssl.SSLContext:
    """The same for HTTP: TLS 1.2 or newer."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    assert tls.certificate is not None
    context.load_cert_chain(tls.certificate, tls.key)
    if client_ca_pem is not None:
        context.load_verify_locations(cadata=client_ca_pem.decode())
        context.verify_mode = ssl.CERT_REQUIRED
    return context
