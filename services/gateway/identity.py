"""Who calls, by the metadata of the call.

Until keys exist, a caller states its tenant itself: metadata `x-shoal-tenant`, or "default".
"""

import hashlib
import re
from collections.abc import Iterable

from services.common.errors import InvalidRequest
from services.common.ids import TenantId
from services.common.telemetry.trace_context import TRACEPARENT_KEY, is_traceparent

TENANT_KEY = "x-shoal-tenant"
DEFAULT_TENANT = TenantId("default")
TENANT_PATTERN = re.compile(r"[A-Za-z0-9._-]{1,64}")
CACHE_SALT_BYTES = 16

Metadata = Iterable[tuple[str, str | bytes]]


def tenant_of(metadata: Metadata) -> TenantId:
    """The tenant that a call is for. Raises InvalidRequest for a name that cannot be one."""
    value = _value(metadata, TENANT_KEY)
    if value is None:
        return DEFAULT_TENANT
    if not TENANT_PATTERN.fullmatch(value):
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
