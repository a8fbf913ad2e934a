"""Kernels for each instruction set that this processor has, not only the widest."""

from collections.abc import Iterator

import pytest

from services.worker.cpu_kernels import library

_WIDEST_FIRST = ("amx", "avx512", "avx2", "generic")
AVAILABLE = _WIDEST_FIRST[_WIDEST_FIRST.index(library.instruction_set()) :]


@pytest.fixture(params=AVAILABLE, autouse=True)
def instruction_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Imported by a test module, it runs every test of it once for each instruction set."""
    library.kernels.cache_clear()
    monkeypatch.setattr(library, "instruction_set", lambda: request.param)
    yield
    library.kernels.cache_clear()
