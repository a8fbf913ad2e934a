"""What a gateway's span of a call says, by OpenTelemetry's GenAI conventions. Never a text: counts and settings."""

from gen.shoal.inference.v1 import inference_pb2
from services.common.errors import ShoalError
from services.common.telemetry import conventions
from services.common.telemetry.tracing import Attributes, Side, Span, Tracer
from services.gateway.metrics import LEFT, OUTCOMES
from services.gateway.streams import Stream


def begin_call(tracer: Tracer, request: inference_pb2.GenerateRequest, model: str, parent: str) -> Span:
    """A call of Generate has come. `parent`: the client's traceparent, or empty."""
    operation = conventions.CHAT if request.HasField("chat") else conventions.TEXT_COMPLETION
    attributes: dict[str, str | int | float] = {
        conventions.OPERATION: operation,
        conventions.PROVIDER: conventions.SHOAL,
        conventions.REQUEST_MODEL: model,
        conventions.REQUEST_CHOICES: max(1, request.n),
    }
    if request.HasField("max_tokens"):
        attributes[conventions.REQUEST_MAX_TOKENS] = request.max_tokens
    if request.sampling.HasField("temperature"):
        attributes[conventions.REQUEST_TEMPERATURE] = request.sampling.temperature
    if request.sampling.HasField("top_p"):
        attributes[conventions.REQUEST_TOP_P] = request.sampling.top_p
    if request.sampling.top_k:
        attributes[conventions.REQUEST_TOP_K] = request.sampling.top_k
    return tracer.begin(f"{operation} {model}", parent, attributes, side=Side.SERVER)


def end_refused(span: Span, error: ShoalError) -> None:
    """The call got this instead of a stream."""
    span.end(error=error.reason or error.code.name)


def end_stream(stream: Stream) -> None:
    """The call's stream is closed."""
    span, end = stream.span, stream.end
    attributes: dict[str, str | int | float | list[str]] = {conventions.RESPONSE_ID: stream.accepted.request_id}
    if stream.called_at_s is not None and stream.first_token_at_s is not None:
        attributes[conventions.RESPONSE_TIME_TO_FIRST_CHUNK_S] = stream.first_token_at_s - stream.called_at_s
    if end is None:
        span.end(attributes, error=LEFT)
    elif isinstance(end, ShoalError):
        span.end(attributes, error=end.reason or end.code.name)
    else:
        span.end({**attributes, **_usage(end)})


def _usage(finished: inference_pb2.Finished) -> Attributes:
    reasons = [finished.reason, *finished.further_reasons]
    return {
        conventions.RESPONSE_FINISH_REASONS: [OUTCOMES.get(reason, "unspecified") for reason in reasons],
        conventions.USAGE_INPUT_TOKENS: finished.usage.prompt_tokens,
        conventions.USAGE_OUTPUT_TOKENS: finished.usage.completion_tokens,
        conventions.USAGE_CACHED_TOKENS: finished.usage.cached_tokens,
    }
