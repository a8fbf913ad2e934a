"""Where a device's weights come from: a model's files, or chance."""

from collections.abc import Callable
from pathlib import Path

import torch

from services.common.model.errors import ModelFileError
from services.common.model.folder import ModelFolder
from services.common.model.stored_model import read_stored_model
from services.worker.cuda.weights import DeviceWeights, dummy_weights, load_weights
from services.worker.runner.models.decoder_weights import DecoderConfig
from services.worker.runner.models.shard import Shard
from services.worker.weight_format import DeviceWeightFormat
from services.worker.weights.load_decoder import Progress
from services.worker.weights.open_decoder import open_decoder


def open_source(
    path: Path, weights: DeviceWeightFormat, shard: Shard, device: torch.device, on_progress: Progress, *, dummy: bool
) -> tuple[DecoderConfig, Callable[[], DeviceWeights]]:
    """Return a model's shape, and what brings a rank's part of its weights onto the device.

    `dummy`: random ones; of a folder, only config.json has to be there. Raises ModelFileError, and so does the loading.
    """
    model = read_stored_model(path)
    if not dummy:
        stored = open_decoder(model)
        return stored.config, lambda: load_weights(stored, weights, shard, device, on_progress)
    if not isinstance(model, ModelFolder):
        raise ModelFileError(path, "--dummy takes the shape of a model's folder, not of a GGUF file")
    # Imported here only, as in `open_decoder`.
    from services.worker.weights.folder_decoder import read_decoder_config

    config = read_decoder_config(model)
    return config, lambda: dummy_weights(config, weights, shard, device)
