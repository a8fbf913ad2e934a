"""Shoal's client: ask a fleet, stream the answer, and keep it when a gateway dies.

    client = shoal.Client("127.0.0.1:50051,127.0.0.1:50052")
    for delta in client.generate("Once upon a time", max_tokens=64):
        print(delta.text, end="", flush=True)

`AsyncClient` is the same for asyncio. Errors are `ShoalError` and its kinds. `_api.py` lists all names.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shoal._api import *  # noqa: F403 - it lists them
else:
    # Not at once: the command `shoal` must have a say before gRPC is imported (services/common/forks.py).
    def __getattr__(name: str) -> object:
        import shoal._api

        if name in ("__all__", *shoal._api.__all__):
            return getattr(shoal._api, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__getattr__("__all__")})
