"""SHOAL_ variables as defaults of flags."""

import os


def default(name: str) -> str | None:
    """What SHOAL_<name> says; None where it is not set, or is empty."""
    return os.environ.get(f"SHOAL_{name}") or None
