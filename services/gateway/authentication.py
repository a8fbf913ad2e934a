"""Who a caller is: its API key says so. Without keys, it may say so itself.

A key that is shown is always verified; `--require-keys` decides whether a caller may show none. So clients can be given
keys first, and keys be required once all have them.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from services.common.errors import PermissionDenied, ShoalError, Unauthenticated
from services.common.store.api_keys import KEY_PREFIX, ApiKeys
from services.gateway.identity import DEFAULT_TENANT, TENANT_KEY, Identity, Metadata, bearer_of, stated_tenant_of
from services.gateway.store_retry import retried

LIFE_S = 2.0
"""A key that was revoked is taken so much longer."""
FRESH_S = 1.0
"""The first caller after this reads the key again, while others still go by what was read."""
MAX_KNOWN = 10_000
"""Keys known at once; the one read longest ago goes."""


@dataclass(slots=True)
class _Known:
    identity: Identity
    read_again_at_s: float
    until_s: float


class Authentication:
    """Turns the metadata of a call into who calls."""

    def __init__(
        self, keys: ApiKeys, required: bool, on_refusal: Callable[[ShoalError], None], clock: Callable[[], float]
    ) -> None:
        """`on_refusal` hears of each call that is refused. `clock`: the loop's, in s."""
        self._keys = keys
        self._required = required
        self._on_refusal = on_refusal
        self._clock = clock
        # By the hash of each key: what a caller showed is not kept.
        self._known: OrderedDict[bytes, _Known] = OrderedDict()

    async def identify(self, metadata: Metadata) -> Identity:
        """Who calls.

        Raises Unauthenticated without a key that counts, PermissionDenied for another tenant's name beside it,
        Unavailable if Redis is away, and InvalidRequest.
        """
        try:
            return await self._identify(metadata)
        except ShoalError as error:
            self._on_refusal(error)
            raise

    async def _identify(self, metadata: Metadata) -> Identity:
        key, stated = bearer_of(metadata), stated_tenant_of(metadata)
        if not self._required and not key.startswith(KEY_PREFIX):
            return Identity(stated or DEFAULT_TENANT)
        if not key:
            raise Unauthenticated(
                "this fleet asks for an API key: send metadata (in HTTP, a header) `authorization: Bearer shoal_...`; "
                "`shoal keys create` makes one",
                reason="KEY_REQUIRED",
            )
        identity = await self._identity_of(key)
        if stated not in (None, identity.tenant):
            raise PermissionDenied(
                f"{TENANT_KEY} is {stated!r}, and the API key is one of tenant {identity.tenant!r}: leave it out",
                reason="NOT_YOUR_TENANT",
                field=TENANT_KEY,
            )
        return identity

    async def _identity_of(self, key: str) -> Identity:
        digest = hashlib.sha256(key.encode()).digest()
        now_s = self._clock()
        known = self._known.get(digest)
        if known and now_s < known.read_again_at_s:
            return known.identity
        if known and now_s < known.until_s:
            known.read_again_at_s = known.until_s
        info = await retried(lambda: self._keys.find(key))
        if info is None:
            self._known.pop(digest, None)
            raise Unauthenticated("the API key is unknown, expired or revoked", reason="KEY_UNKNOWN")
        identity = Identity(info.tenant, info.max_in_flight, info.max_tokens_per_minute)
        self._known[digest] = _Known(identity, now_s + FRESH_S, now_s + LIFE_S)
        self._known.move_to_end(digest)
        if len(self._known) > MAX_KNOWN:
            self._known.popitem(last=False)
        return identity
