"""Names of what spans say. The GenAI ones are OpenTelemetry's, which has no stable package for them: written out here.

https://github.com/open-telemetry/semantic-conventions-genai (all in development).
"""

OPERATION = "gen_ai.operation.name"
CHAT, TEXT_COMPLETION = "chat", "text_completion"
PROVIDER = "gen_ai.provider.name"
SHOAL = "shoal"
REQUEST_MODEL = "gen_ai.request.model"
REQUEST_MAX_TOKENS = "gen_ai.request.max_tokens"
REQUEST_CHOICES = "gen_ai.request.choice.count"
REQUEST_TEMPERATURE = "gen_ai.request.temperature"
REQUEST_TOP_P = "gen_ai.request.top_p"
REQUEST_TOP_K = "gen_ai.request.top_k"
RESPONSE_ID = "gen_ai.response.id"
RESPONSE_FINISH_REASONS = "gen_ai.response.finish_reasons"
RESPONSE_TIME_TO_FIRST_CHUNK_S = "gen_ai.response.time_to_first_chunk"
USAGE_INPUT_TOKENS = "gen_ai.usage.input_tokens"
USAGE_OUTPUT_TOKENS = "gen_ai.usage.output_tokens"
USAGE_CACHED_TOKENS = "gen_ai.usage.cache_read.input_tokens"
ERROR_TYPE = "error.type"

ATTEMPT = "shoal.attempt.number"
WORKER = "shoal.worker.id"
STATE = "shoal.request.state"
INPUT_BYTES = "shoal.input_bytes"
"""Size of an input; never the input."""
