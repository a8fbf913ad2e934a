"""Which block holds which tokens: so that a prompt whose beginning was computed before is not computed again.

A block's hash speaks of all that its keys and values depend on: the tokens in it and before it, and the salt of the
tenant, who alone may find it.
"""

from array import array
from collections.abc import Sequence as Tokens
from hashlib import blake2b
from typing import NewType

from services.worker.engine.block_pool import BlockId

BlockHash = NewType("BlockHash", bytes)

_HASH_BYTES = 16
"""128 bits: two of 10^9 blocks share a hash once in 10^20 caches, also if somebody looks for it (BLAKE2, RFC 7693)."""


def block_hash(parent: BlockHash | bytes, token_ids: Tokens[int]) -> BlockHash:
    """Return the hash of a full block of tokens behind another block; `parent` of the first one is the salt."""
    hashed = blake2b(len(parent).to_bytes(4, "little") + parent, digest_size=_HASH_BYTES)
    hashed.update(array("I", token_ids).tobytes())
    return BlockHash(hashed.digest())


class PrefixCache:
    """The blocks that can be found by their content. Changed by the planner, and by the pool when it reuses a block."""

    def __init__(self) -> None:
        self._block_of: dict[BlockHash, BlockId] = {}
        self._hash_of: dict[BlockId, BlockHash] = {}

    def __contains__(self, block: BlockId) -> bool:
        return block in self._hash_of

    def find(self, block_hashes: Tokens[BlockHash]) -> list[BlockId]:
        """Return the blocks of the longest known prefix."""
        found = []
        for hashed in block_hashes:
            block = self._block_of.get(hashed)
            if block is None:
                break
            found.append(block)
        return found

    def add(self, block: BlockId, hashed: BlockHash) -> None:
        """A block is full and computed. If another one holds the same, that one stays the one that is found."""
        if hashed not in self._block_of and block not in self._hash_of:
            self._block_of[hashed] = block
            self._hash_of[block] = hashed

    def forget(self, block: BlockId) -> None:
        """A block's content is about to be overwritten."""
        hashed = self._hash_of.pop(block, None)
        if hashed is not None:
            del self._block_of[hashed]
