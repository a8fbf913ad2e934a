"""Who calls, as the metadata of the call states it; `authentication` says which of it is believed."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

from services.common.errors import InvalidRequest
from services.common.ids import TenantId, is_tenant
from services.common.telemetry.trace_context import TRACEPARENT_KEY, is_traceparent

AUTHORIZATION_KEY = "authorization"
TENANT_KEY = "x-shoal-tenant"
DEFAULT_TENANT = TenantId("default")
CACHE_SALT_BYTES = 16

Metadata = Iterable[tuple[str, str | bytes]]


@dataclass(frozen=True, slots=True)
class Identity:
    """Who calls."""

    tenant: TenantId
    max_in_flight: int = 0
    """Most requests of the tenant in flight in the pool; 0: any number."""
    max_tokens_per_minute: int = 0
    """Most tokens that its requests may take in the pool; 0: any number."""


def bearer_of(metadata: Metadata) -> str:
    """The token of `authorization: Bearer ...`; empty if there is none."""
    scheme, _, token = (_value(metadata, AUTHORIZATION_KEY) or "").strip().partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


def stated_tenant_of(metadata: Metadata) -> TenantId | None:
    """The tenant that a caller says it is. Raises InvalidRequest for a name that cannot be one."""
    value = _value(metadata, TENANT_KEY)
    if value is None:
        return None
    if not is_tenant(value):
        raise InvalidRequest(
            f"metadata {TENANT_KEY} is {value[:80]!r}; expected 1 to 64 of A-Z a-z 0-9 . _ -",
            reason="INVALID_FIELD",
            field=TENANT_KEY,
        )
    return TenantId(value)


def traceparent_of(metadata: Metadata) -> str:
    """The call's W3C trace context; empty if there is none that is well formed."""
    value = _value(metadata, TRACEPARENT_KEY)
    return value if value and is_traceparent(value) else ""


def cache_salt(tenant: TenantId) -> bytes:
    """What keeps this tenant's prefix cache apart from any other's; a caller cannot choose it."""
    return hashlib.sha256(b"shoal prefix cache of tenant " + tenant.encode()).digest()[:CACHE_SALT_BYTES]


def _value(metadata: Metadata, wanted: str) -> str | None:
    for key, value in metadata:
        if key == wanted and isinstance(value, str):
            return value
    return None
