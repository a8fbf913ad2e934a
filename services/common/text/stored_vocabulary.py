"""A model's vocabulary, out of whatever form the model is stored in."""

from services.common.model.gguf import GgufFile
from services.common.model.stored_model import StoredModel
from services.common.text.folder_vocabulary import read_folder_vocabulary
from services.common.text.gguf_vocabulary import read_gguf_vocabulary
from services.common.text.vocabulary import Vocabulary


def read_vocabulary(model: StoredModel) -> Vocabulary:
    """Read what each token says. Raises ModelFileError if the vocabulary's kind is not supported, or it is damaged."""
    return read_gguf_vocabulary(model) if isinstance(model, GgufFile) else read_folder_vocabulary(model)
