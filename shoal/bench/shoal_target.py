"""Shoal's gateways as a target, over gRPC."""

import itertools
from collections.abc import Sequence

import grpc

from gen.shoal.inference.v1 import inference_pb2 as pb
from gen.shoal.inference.v1 import inference_pb2_grpc
from services.common.errors import InvalidRequest, from_rpc
from services.common.tls.files import Tls
from shoal._gateways import CallMetadata, aio_channel
from shoal._prompt import Options, generate_request
from shoal._values import Model, models_of
from shoal.bench.ask import Ask
from shoal.bench.target import OnTokens, TargetError, TokenCounts, check_length


class ShoalTarget:
    """Each request at the next gateway in turn. Not by `AsyncClient`: its retries would hide what failed."""

    def __init__(
        self, gateways: Sequence[str], model: str, timeout_s: float, tls: Tls | None = None, metadata: CallMetadata = ()
    ) -> None:
        """`model`: empty: the fleet's only one; `tls`: None: in plain."""
        self.name = f"shoal at {','.join(gateways)}"
        self._model = model
        self._timeout_s = timeout_s
        self._channels = [aio_channel(address, tls) for address in gateways]
        self._metadata = metadata
        self._turns = itertools.cycle([inference_pb2_grpc.InferenceServiceStub(channel) for channel in self._channels])

    async def describe(self) -> Model:
        """The model that is measured. Raises ShoalError."""
        try:
            response = await next(self._turns).ListModels(
                pb.ListModelsRequest(), timeout=self._timeout_s, metadata=self._metadata
            )
        except grpc.RpcError as error:
            raise from_rpc(error) from error
        models = [model for model in models_of(response) if self._model in ("", model.name)]
        if not models:
            raise TargetError("no model", f"the fleet does not serve {self._model!r}")
        return models[0]

    async def ask(self, ask: Ask, on_tokens: OnTokens) -> TokenCounts:
        """Send one request and read its stream to the end. Raises TargetError."""
        usage = None
        try:
            call = next(self._turns).Generate(self._request(ask), timeout=self._timeout_s, metadata=self._metadata)
            async for response in call:
                if response.HasField("delta"):
                    if response.delta.token_ids:
                        on_tokens()
                elif response.HasField("finished"):
                    usage = response.finished.usage
        except (grpc.RpcError, InvalidRequest) as error:
            failure = error if isinstance(error, InvalidRequest) else from_rpc(error)
            raise TargetError(f"{failure.code.name} {failure.reason}".strip(), failure.message) from error
        if usage is None:
            raise TargetError("broken stream", "the stream ended before the answer's end")
        check_length(ask, usage.completion_tokens)
        return TokenCounts(usage.completion_tokens, usage.prompt_tokens, usage.cached_tokens)

    async def close(self) -> None:
        """Hang up."""
        for channel in self._channels:
            await channel.close(None)

    def _request(self, ask: Ask) -> pb.GenerateRequest:
        options: Options = {
            "model": self._model,
            "max_tokens": ask.max_tokens,
            "ignore_eos": ask.ignore_eos,
            "temperature": ask.temperature,
        }
        return generate_request(ask.prompt, ask.messages or None, ask.token_ids or None, options)
