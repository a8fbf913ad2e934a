"""API keys: who may call, and for which tenant. Redis has a hash of each key, never the key.

A key is `shoal_<id>_<secret>`: 12 hexadecimal digits by which it is found and shown, then 192 random bits. So much
chance needs no slow hash: nobody can try a share of it that counts (ADR 13).
"""

import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass

from redis.asyncio import Redis

from gen.shoal.fleet.v1.api_key_pb2 import ApiKey
from services.common.ids import TenantId, is_tenant
from services.common.store.clock import now_ms
from services.common.store.connection import Argument, StoreError, command
from services.common.store.keys import api_key_key

KEY_PREFIX = "shoal_"
_KEY = re.compile(KEY_PREFIX + "([0-9a-f]{12})_[0-9a-f]{48}")
_KEY_ID = re.compile("[0-9a-f]{12}")
_SCAN_COUNT = 1_000
"""Keys that one step of a scan looks at."""


@dataclass(frozen=True, slots=True)
class KeyInfo:
    """What is known of a key, without the key. Times are Redis' clock, ms since the epoch."""

    key_id: str
    tenant: TenantId
    max_in_flight: int
    """Most requests of the tenant in flight in a pool; 0: any number."""
    max_tokens_per_minute: int
    """Most tokens that the tenant's requests may take in a pool; 0: any number."""
    created_at_ms: int
    expires_at_ms: int
    """0: never."""


class ApiKeys:
    """The keys of a fleet. All methods raise StoreUnavailable; only `create` must not be repeated blindly."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    async def create(
        self, tenant: str, max_in_flight: int = 0, lifetime_ms: int = 0, max_tokens_per_minute: int = 0
    ) -> tuple[str, KeyInfo]:
        """Make a key, which is told here and never again. `lifetime_ms`: 0: it does not expire.

        Raises ValueError for a name that no tenant can have, and StoreFull.
        """
        if not is_tenant(tenant):
            raise ValueError(f"tenant {tenant!r}: expected 1 to 64 of A-Z a-z 0-9 . _ -")
        key_id = secrets.token_hex(6)
        key = f"{KEY_PREFIX}{key_id}_{secrets.token_hex(24)}"
        created_at_ms = await now_ms(self._redis)
        stored = ApiKey(
            key_id=key_id,
            digest=_digest(key),
            tenant=tenant,
            max_in_flight=max_in_flight,
            max_tokens_per_minute=max_tokens_per_minute,
            created_at_ms=created_at_ms,
            expires_at_ms=created_at_ms + lifetime_ms if lifetime_ms else 0,
        )
        expiry: tuple[Argument, ...] = ("PX", lifetime_ms) if lifetime_ms else ()
        if not await command(self._redis, "SET", api_key_key(key_id), stored.SerializeToString(), "NX", *expiry):
            raise StoreError(f"key id {key_id} is taken, by a chance of 1 in 2^48: make the key again")
        return key, _info(stored)

    async def find(self, key: str) -> KeyInfo | None:
        """What a key that somebody shows stands for. None: no such key is, or it was revoked, or has expired."""
        shape = _KEY.fullmatch(key)
        found = await command(self._redis, "GET", api_key_key(shape[1])) if shape else None
        if found is None:
            return None
        stored = ApiKey.FromString(found)
        return _info(stored) if hmac.compare_digest(stored.digest, _digest(key)) else None

    async def revoke(self, key_id: str) -> bool:
        """End a key. False: there is none with this id."""
        return bool(_KEY_ID.fullmatch(key_id) and await command(self._redis, "DEL", api_key_key(key_id)))

    async def all(self) -> list[KeyInfo]:
        """Every key that is neither revoked nor expired, oldest first. Walks all keys of the server."""
        infos: dict[str, KeyInfo] = {}
        cursor = b"0"
        while True:
            cursor, names = await command(self._redis, "SCAN", cursor, "MATCH", api_key_key("*"), "COUNT", _SCAN_COUNT)
            for name in names:
                found = await command(self._redis, "GET", name)
                if found is not None:
                    info = _info(ApiKey.FromString(found))
                    infos[info.key_id] = info  # a scan may name one twice
            if cursor == b"0":
                return sorted(infos.values(), key=lambda info: info.created_at_ms)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _info(stored: ApiKey) -> KeyInfo:
    return KeyInfo(
        stored.key_id,
        TenantId(stored.tenant),
        stored.max_in_flight,
        stored.max_tokens_per_minute,
        stored.created_at_ms,
        stored.expires_at_ms,
    )
