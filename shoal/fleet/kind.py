"""The kinds of processes, by the names that users see."""

from enum import StrEnum


class Kind(StrEnum):
    """What a process is."""

    GATEWAY = "gateway"
    TOKENIZER = "tokenizer"
    SCHEDULER = "scheduler"
    WORKER = "worker"
    ENGINE = "engine"
    """Started by its worker, not by us."""
    REDIS = "redis"
