"""Shoal's own settings, and what is changed of them for a measurement."""

import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

from services.common.config import parse
from services.worker.config import WorkerConfig
from services.worker.engine_config import EngineConfig
from services.worker.front import engine_client


def offers(setting: str) -> bool:
    """Whether a worker has this setting."""
    return setting in {field.name for field in fields(WorkerConfig)}


def as_variables(settings: Mapping[str, str]) -> dict[str, str]:
    """Return settings as the variables of the environment that a fleet takes them from."""
    return {f"SHOAL_{name.upper()}": value for name, value in settings.items()}


def engine_config(model: Path, settings: Mapping[str, str]) -> EngineConfig:
    """Return what a worker with these settings would tell its engine."""
    environment = {**os.environ, **as_variables(settings)}
    worker = parse(WorkerConfig, "worker", ["--model-path", str(model)], environment).config
    return engine_client.engine_config(worker, fd=0)
