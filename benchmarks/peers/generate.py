"""transformers' `generate()`: one padded batch."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import transformers

from benchmarks.engine.protocol import Answer, serve
from benchmarks.peers.gguf_model import load_model


class FirstToken:
    """A streamer: sees the prompts, then the tokens of each step; remembers when the first ones came."""

    def __init__(self) -> None:
        self._num_seen = 0
        self.first_s = 0.0

    def put(self, value: torch.Tensor) -> None:
        self._num_seen += 1
        if self._num_seen == 2:
            self.first_s = time.perf_counter()

    def end(self) -> None:
        pass


class Generate:
    def load(self, model: Path, settings: Mapping[str, str]) -> str:
        self._model = load_model(model)
        return f"transformers {transformers.__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads"

    @torch.inference_mode()
    def run(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> Answer:
        began_s = time.perf_counter()
        input_ids = torch.tensor(prompts)
        streamer = FirstToken()
        output = self._model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=max_tokens,
            do_sample=False,
            streamer=streamer,
        )
        token_ids = output[:, input_ids.shape[1] :].tolist()
        last_s = time.perf_counter()
        return Answer(token_ids, streamer.first_s - began_s, last_s - began_s)

    def close(self) -> None:
        pass


if __name__ == "__main__":
    serve(Generate())
