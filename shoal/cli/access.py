"""Flags of every command that calls gateways: TLS, and the caller's key."""

import argparse

from services.common.tls.files import Tls
from shoal.cli.environment import default
from shoal.fleet.running import RunningFleet


def add_access_flags(parser: argparse.ArgumentParser) -> None:
    """Declare them."""
    access = parser.add_argument_group("access")
    access.add_argument(
        "--api-key", default=default("API_KEY"), metavar="KEY", help="one of `shoal keys create` (SHOAL_API_KEY)"
    )
    access.add_argument("--tls", action="store_true", help="call by TLS, trusting well-known authorities")
    for name, about in (
        ("ca", "call by TLS, trusting the authorities in this PEM file"),
        ("certificate", "show the certificate in this PEM file"),
        ("key", "private key of the certificate, in PEM"),
    ):
        variable = f"TLS_{name.upper()}"
        access.add_argument(
            f"--tls-{name}", default=default(variable), metavar="FILE", help=f"{about} (SHOAL_{variable})"
        )


def tls_of(arguments: argparse.Namespace, running: RunningFleet | None) -> Tls | None:
    """How to call: as the flags say, else as the running fleet here is called; None: in plain. Raises TlsError."""
    files = {name: getattr(arguments, f"tls_{name}") for name in ("ca", "certificate", "key")}
    if arguments.tls or any(files.values()):
        return Tls(**files)
    return running.tls if running else None
