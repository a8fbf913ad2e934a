import services.common.forks  # noqa: F401 - in front of gRPC
