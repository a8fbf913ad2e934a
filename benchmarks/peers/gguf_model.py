"""A GGUF file as a model of transformers, in float32 on all cores."""

import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM


def load_model(path: Path) -> Any:
    """Load it, and set the process's number of threads."""
    torch.set_num_threads(os.cpu_count() or 1)
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    # Else they would be taken for what an explicit configuration leaves out.
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model
