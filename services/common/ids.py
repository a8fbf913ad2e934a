"""Ids as types, and how they are drawn."""

import re
import secrets
from typing import NewType

RequestKey = NewType("RequestKey", str)
"""`<tenant>/<request id>`: a request in the whole fleet."""
WorkerId = NewType("WorkerId", str)
"""New at each start of a worker's engine."""
NO_WORKER = WorkerId("")
GatewayId = NewType("GatewayId", str)
"""`<fleet address>#<nonce>`, new at each start of a gateway, so that its readers are not taken for those of one that
died at the same address. Workers dial the address."""
TenantId = NewType("TenantId", str)
Epoch = NewType("Epoch", int)
"""Number of a leader's reign; grows by each election."""


_TENANT = re.compile(r"[A-Za-z0-9._-]{1,64}")


def is_tenant(name: str) -> bool:
    """Whether a tenant may have this name."""
    return bool(_TENANT.fullmatch(name))


def request_key(tenant: str, request_id: str) -> RequestKey:
    """The key of a tenant's request. Neither part may hold a `/`; both are validated at the gateway."""
    return RequestKey(f"{tenant}/{request_id}")


def new_request_id() -> str:
    """A request id for callers that give none: 128 random bits."""
    return f"r-{secrets.token_hex(16)}"


def new_worker_id() -> WorkerId:
    """A worker id: 64 random bits."""
    return WorkerId(f"w-{secrets.token_hex(8)}")


def new_gateway_id(address: str) -> GatewayId:
    """The id of the gateway that serves workers at this address from now on."""
    return GatewayId(f"{address}#{secrets.token_hex(8)}")


def fleet_address(gateway: str) -> str:
    """Where workers reach the gateway with this id: `host:port`."""
    return gateway.rsplit("#", 1)[0]


def new_nonce() -> str:
    """What tells apart two attempts of the same number: 64 random bits."""
    return secrets.token_hex(8)
