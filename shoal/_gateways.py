"""The gateways of a fleet as a client knows them: addresses, and how a channel to one is set up."""

import itertools
from collections.abc import Iterator, Sequence

import grpc

from services.common.tls.credentials import channel_credentials
from services.common.tls.files import Tls

CallMetadata = tuple[tuple[str, str], ...]

CHANNEL_OPTIONS: Sequence[tuple[str, int]] = (
    ("grpc.max_receive_message_length", 16 * 1024 * 1024),
    ("grpc.max_send_message_length", 16 * 1024 * 1024),
    # A frozen gateway, or one behind a cut line, is found by pings; without the last option, gRPC stops pinging while
    # only the server has something to say. Gateways allow a ping each 5 s.
    ("grpc.keepalive_time_ms", 6_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
    # Also the limit for connecting, whose default of 20 s would be most of the time that an outage may take.
    ("grpc.min_reconnect_backoff_ms", 3_000),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    # Each client its own connections: closing one must not depend on another.
    ("grpc.use_local_subchannel_pool", 1),
)


def blocking_channel(address: str, tls: Tls | None) -> grpc.Channel:
    """To one gateway; `tls`: None: in plain."""
    if tls is None:
        return grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
    return grpc.secure_channel(address, channel_credentials(tls), options=CHANNEL_OPTIONS)


def aio_channel(address: str, tls: Tls | None) -> grpc.aio.Channel:
    """The same for asyncio."""
    if tls is None:
        return grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
    return grpc.aio.secure_channel(address, channel_credentials(tls), options=CHANNEL_OPTIONS)


def parse_addresses(gateways: str | Sequence[str]) -> tuple[str, ...]:
    """The addresses in "host:port,host:port" or a list of such. Raises ValueError for none, or one without a port."""
    given = gateways.split(",") if isinstance(gateways, str) else gateways
    addresses = tuple(address.strip() for address in given if address.strip())
    if not addresses:
        raise ValueError("no gateway is given; expected host:port, or several with commas between")
    for address in addresses:
        if not address.rpartition(":")[2].isdigit():
            raise ValueError(f"gateway {address!r} has no port; expected host:port")
    return addresses


def call_metadata(api_key: str | None) -> CallMetadata:
    """What goes with each call. Raises ValueError for a key that cannot be sent."""
    if api_key is None:
        return ()
    if not (api_key.isascii() and api_key.isprintable() and api_key.strip()):
        raise ValueError("the API key is empty, or has characters that no key has")
    return (("authorization", f"Bearer {api_key.strip()}"),)


def turns(num_gateways: int, first: int) -> Iterator[int]:
    """Where each new request begins: every gateway in its turn."""
    return (number % num_gateways for number in itertools.count(first))
