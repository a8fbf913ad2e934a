"""llama.cpp, through its batch interface: all streams in one context, each a sequence of its own."""

import ctypes
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import llama_cpp
import numpy as np
from llama_cpp import llama_cpp as api

from benchmarks.engine.protocol import Answer, serve

BATCH_TOKENS = 512
"""Most tokens computed at once: llama.cpp's default. 128 was not faster, nor was one cache for all streams."""
CONTEXT_STEP_TOKENS = 256
"""What llama.cpp rounds a sequence's context up to."""


class Llama:
    """A context for each number of streams: it is made for that many sequences of as many tokens."""

    def load(self, model: Path, settings: Mapping[str, str]) -> str:
        """`settings`: `kv_cache` is float32 or float16."""
        api.llama_backend_init()
        self._kv_type = {"float32": api.GGML_TYPE_F32, "float16": api.GGML_TYPE_F16}[settings["kv_cache"]]
        self._num_threads = os.cpu_count() or 1
        self._model = api.llama_model_load_from_file(os.fsencode(model), api.llama_model_default_params())
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {model}")
        self._vocabulary_size = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self._model))
        self._contexts: dict[tuple[int, int], api.llama_context_p] = {}
        return (
            f"llama-cpp-python {llama_cpp.__version__}, {settings['kv_cache']} KV cache, {self._num_threads} threads; "
            f"{api.llama_print_system_info().decode().strip()}"
        )

    def run(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> Answer:
        context = self._context(len(prompts), len(prompts[0]) + max_tokens)
        api.llama_memory_clear(api.llama_get_memory(context), False)
        began_s = time.perf_counter()
        token_ids = [[token_id] for token_id in self._prefill(context, prompts)]
        first_s = time.perf_counter()
        for position in range(len(prompts[0]), len(prompts[0]) + max_tokens - 1):
            rows = [(stream, position, tokens[-1], True) for stream, tokens in enumerate(token_ids)]
            for tokens, token_id in zip(token_ids, self._decode(context, rows), strict=True):
                tokens.append(token_id)
        last_s = time.perf_counter()
        return Answer(token_ids, first_s - began_s, last_s - began_s)

    def close(self) -> None:
        """The process's end frees all."""

    def _prefill(self, context: "api.llama_context_p", prompts: Sequence[Sequence[int]]) -> list[int]:
        """Compute all prompts, as many tokens at once as a context takes; return what follows each."""
        last = len(prompts[0]) - 1
        rows = [
            (stream, position, token_id, position == last)
            for stream, prompt in enumerate(prompts)
            for position, token_id in enumerate(prompt)
        ]
        most = api.llama_n_batch(context)
        return [
            token_id
            for first in range(0, len(rows), most)
            for token_id in self._decode(context, rows[first : first + most])
        ]

    def _decode(self, context: "api.llama_context_p", rows: Sequence[tuple[int, int, int, bool]]) -> list[int]:
        """Compute tokens, each (stream, position, token, whether its successor is wanted); return the successors."""
        batch = api.llama_batch_init(len(rows), 0, 1)
        try:
            batch.n_tokens = len(rows)
            for index, (stream, position, token_id, wanted) in enumerate(rows):
                batch.token[index] = token_id
                batch.pos[index] = position
                batch.n_seq_id[index] = 1
                batch.seq_id[index][0] = stream
                batch.logits[index] = wanted
            if status := api.llama_decode(context, batch):
                raise RuntimeError(f"llama_decode of {len(rows)} tokens: status {status}")
        finally:
            api.llama_batch_free(batch)
        return [self._best(context, index) for index, row in enumerate(rows) if row[3]]

    def _best(self, context: "api.llama_context_p", index: int) -> int:
        logits = ctypes.cast(api.llama_get_logits_ith(context, index), ctypes.POINTER(ctypes.c_float))
        return int(np.ctypeslib.as_array(logits, (self._vocabulary_size,)).argmax())

    def _context(self, num_streams: int, tokens_per_stream: int) -> "api.llama_context_p":
        key = num_streams, tokens_per_stream
        if key not in self._contexts:
            parameters = api.llama_context_default_params()
            parameters.n_seq_max = num_streams
            parameters.n_ctx = num_streams * -(-tokens_per_stream // CONTEXT_STEP_TOKENS) * CONTEXT_STEP_TOKENS
            parameters.n_batch = parameters.n_ubatch = BATCH_TOKENS
            parameters.n_threads = parameters.n_threads_batch = self._num_threads
            parameters.type_k = parameters.type_v = self._kv_type
            context = api.llama_init_from_model(self._model, parameters)
            if not context:
                raise RuntimeError(f"llama.cpp cannot make a context for {num_streams} streams")
            self._contexts[key] = context
        return self._contexts[key]


if __name__ == "__main__":
    serve(Llama())
