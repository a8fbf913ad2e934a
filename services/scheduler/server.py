"""The scheduler's gRPC server: health, reflection, and demand for KEDA. A follower is as good as a leader."""

import grpc

from gen.keda import externalscaler_pb2_grpc
from services.common.rpc import Server
from services.common.store.demand import DemandStore
from services.scheduler.external_scaler import SERVICE_NAME, ExternalScaler


def make_server(demand: DemandStore, credentials: grpc.ServerCredentials | None) -> Server:
    """A server of one pool's demand; explanations will be served here too. No credentials: in plain."""
    server = Server([SERVICE_NAME], credentials=credentials)
    externalscaler_pb2_grpc.add_ExternalScalerServicer_to_server(ExternalScaler(demand), server.grpc)
    return server
