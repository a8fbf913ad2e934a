"""A streamed answer by grpcio alone, from protos/: `make protos`, then `python examples/plain_grpc.py HOST:PORT`."""

import sys

import grpc

from gen.shoal.inference.v1 import inference_pb2, inference_pb2_grpc

with grpc.insecure_channel(sys.argv[1]) as channel:
    fleet = inference_pb2_grpc.InferenceServiceStub(channel)
    question = inference_pb2.ChatMessage(role="user", content="Name three oceans.")
    request = inference_pb2.GenerateRequest(
        chat=inference_pb2.Chat(messages=[question]),
        sampling=inference_pb2.Sampling(temperature=0),
        max_tokens=64,
    )
    for response in fleet.Generate(request, timeout=60):
        print(response.delta.text, end="", flush=True)
print()
