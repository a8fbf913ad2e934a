"""What a person asks of `shoal up`."""

import re
from dataclasses import dataclass
from pathlib import Path

from services.common.tls.files import Tls


@dataclass(frozen=True, slots=True)
class FleetOptions:
    """How many of each service, of which model, on which Redis."""

    model_path: Path
    """A GGUF file, or a folder in the layout of Hugging Face."""
    workers: int = 1
    """Those that always run."""
    spare_workers: int = 0
    """Further ones, that run while the scheduler wants them."""
    shards: int = 1
    """Processes that each worker's model is dealt out to."""
    device: str = "cpu"
    """What workers compute on: cpu or cuda."""
    dtype: str = ""
    """How a GPU holds weights; empty: the workers' default."""
    kv_dtype: str = ""
    """How a GPU holds keys and values; empty: the workers' default."""
    dummy: bool = False
    """Random weights, on a GPU."""
    gateways: int = 1
    schedulers: int = 1
    tokenizers: int = 1
    redis_url: str = ""
    """Empty: an embedded one."""
    data_dir: Path | None = None
    """Of the embedded Redis; None: inside the state directory."""
    port: int = 0
    """Of the first gateway; the next have the ports above. 0: free ones."""

    http_port: int = 0
    """The same of HTTP."""
    metrics: bool = False
    """Every service serves its figures to Prometheus."""

    tls: Tls | None = None
    """What every service shows and trusts; None: they speak in plain."""

    @property
    def pool(self) -> str:
        """The pool's and the model's name: the file's without ending, or the folder's, without quantization."""
        is_file = self.model_path.suffix.lower() == ".gguf"  # What follows a dot in a folder's name is no ending.
        name = self.model_path.stem if is_file else self.model_path.name
        stem = re.sub(r"[.-](i?q\d\w*|b?f\d+)$", "", name.lower())
        return re.sub(r"[^a-z0-9._-]+", "-", stem) or "model"
