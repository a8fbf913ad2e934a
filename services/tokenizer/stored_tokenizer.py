"""A model's tokenizer, out of whatever form the model is stored in."""

from collections.abc import Callable
from datetime import datetime

from services.common.model.gguf import GgufFile
from services.common.model.stored_model import StoredModel
from services.tokenizer.folder_tokenizer import read_folder_tokenizer
from services.tokenizer.gguf_tokenizer import read_gguf_tokenizer
from services.tokenizer.model_tokenizer import ModelTokenizer


def read_tokenizer(model: StoredModel, now: Callable[[], datetime]) -> ModelTokenizer:
    """Read a tokenizer; `now` is the clock of its template. Raises ModelFileError if it is not supported."""
    return read_gguf_tokenizer(model, now) if isinstance(model, GgufFile) else read_folder_tokenizer(model, now)
