"""A decoder out of whatever form a model is stored in."""

from services.common.model.gguf import GgufFile
from services.common.model.stored_model import StoredModel
from services.worker.weights.gguf_decoder import open_gguf_decoder
from services.worker.weights.stored_decoder import StoredDecoder


def open_decoder(model: StoredModel) -> StoredDecoder:
    """Open a model's weights. Raises ModelFileError if this engine would compute it wrongly."""
    if isinstance(model, GgufFile):
        return open_gguf_decoder(model)
    # Imported here only: a GGUF file needs no library for safetensors.
    from services.worker.weights.folder_decoder import open_folder_decoder

    return open_folder_decoder(model)
