"""Free ports, chosen once for a fleet's life, so that what restarts is found where it was."""

import random
import socket
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from shoal.fleet.errors import FleetError

HOST = "127.0.0.1"
LOWEST_PORT = 10_240
_EPHEMERAL_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
_TRIES_A_PORT = 200


def choose_ports(num_ports: int, rng: random.Random) -> list[int]:
    """Different ports that are free now, below the range from which the system draws ports of connections.

    A port inside that range could be drawn for a connection, even one to itself, while its process restarts.
    """
    highest = _lowest_ephemeral_port() - 1
    with ExitStack() as bound:
        ports: list[int] = []
        for _ in range(num_ports * _TRIES_A_PORT):
            if len(ports) == num_ports:
                return ports
            probe = bound.enter_context(socket.socket())
            port = rng.randint(LOWEST_PORT, highest)
            if _bind(probe, port):
                ports.append(port)
    if len(ports) == num_ports:
        return ports
    raise FleetError(f"found {len(ports)} free ports in {LOWEST_PORT} to {highest}; {num_ports} are needed")


def check_ports(ports: Sequence[int], option: str) -> None:
    """Raises FleetError if one of these is taken. `option`: the flag that chose them."""
    for port in ports:
        with socket.socket() as probe:
            if not _bind(probe, port):
                raise FleetError(f"port {port} is taken: choose another by {option}, or leave it out for a free one")


def _bind(probe: socket.socket, port: int) -> bool:
    # As servers do: else a port whose last connections are still in TIME_WAIT looks taken.
    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        probe.bind((HOST, port))
        probe.listen()
    except OSError:
        return False
    return True


def _lowest_ephemeral_port() -> int:
    try:
        return max(LOWEST_PORT + 2000, int(_EPHEMERAL_RANGE.read_text().split()[0]))
    except (OSError, ValueError):
        return 32_768
