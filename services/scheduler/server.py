"""The scheduler's gRPC server: health and reflection. A follower is as healthy as a leader."""

from services.common.rpc import Server


def make_server() -> Server:
    """A server without services of its own yet; demand and explanations will be served here."""
    return Server([])
