"""What a person asks of `shoal up`."""

import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class FleetOptions:
    """How many of each service, of which model, on which Redis."""

    model_path: Path
    """A GGUF file."""
    workers: int = 1
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

    @property
    def pool(self) -> str:
        """The pool's and the model's name: the file's, without its ending and quantization, in lower case."""
        stem = re.sub(r"[.-](i?q\d\w*|b?f\d+)$", "", self.model_path.stem.lower())
        return re.sub(r"[^a-z0-9._-]+", "-", stem) or "model"
