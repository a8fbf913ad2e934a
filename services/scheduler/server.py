"""The scheduler's gRPC server: health and reflection. A follower is as healthy as a leader."""

import grpc

from services.common.rpc import Server


def make_server(credentials: grpc.ServerCredentials | None) -> Server:
    """A server without services of its own yet; demand and explanations will be served here. None: in plain."""
    return Server([], credentials=credentials)
