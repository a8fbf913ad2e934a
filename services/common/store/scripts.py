"""Lua scripts: `lua/prelude.lua` and one file a move, loaded and called.

A script's text is the file's own `#!lua` line, the prelude, and the file. The line's flags say what happens when Redis
is at its memory limit: scripts with `allow-oom` run, others are refused before their first line (error OOM).

Every script has KEYS[1] = the pool's generation key, and ARGV[1..3] = the pool's prefix, the time in ms (empty: that
of Redis; only tests state it) and the retention in ms. What follows is listed at the top of each file. All keys that
it builds from the prefix share the slot of KEYS[1].
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from redis import exceptions
from redis.asyncio import Redis

from services.common.store.connection import Argument, command

_FOLDER = Path(__file__).parent / "lua"


@dataclass(frozen=True, slots=True)
class Script:
    """A script's whole text, and the SHA1 by which Redis knows it."""

    name: str
    text: str
    sha: str

    @staticmethod
    def load(name: str) -> "Script":
        """Read `lua/<name>.lua` and put the prelude in it. The file begins with `#!lua`."""
        prelude = (_FOLDER / "prelude.lua").read_text(encoding="utf-8")
        shebang, body = (_FOLDER / f"{name}.lua").read_text(encoding="utf-8").split("\n", 1)
        text = f"{shebang}\n{prelude}\n{body}"
        return Script(name, text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())

    async def call(self, redis: Redis, keys: Sequence[str], arguments: Sequence[Argument]) -> Any:
        """Run it; its text is sent only where Redis does not know it. Raises StoreError."""
        try:
            return await command(redis, "EVALSHA", self.sha, len(keys), *keys, *arguments)
        except exceptions.NoScriptError:
            return await command(redis, "EVAL", self.text, len(keys), *keys, *arguments)
