"""Log-probabilities of one choice that grow token by token, kept as the JSON that they become.

An entry takes about 70 bytes so, where Python's values take 500: a request may ask for a million.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

Part = Mapping[str, Sequence[Any] | None]
"""Lists by their names; None: a name that has no list."""


class LogprobLists:
    """Lists that are added to. `empty`: their names."""

    def __init__(self, empty: Part) -> None:
        self._pieces: dict[str, list[bytes] | None] = {
            name: None if values is None else [] for name, values in empty.items()
        }

    def add(self, part: Part) -> None:
        """Put each list behind the one of its name."""
        for name, values in part.items():
            pieces = self._pieces[name]
            if values and pieces is not None:
                pieces.append(msgspec.json.encode(values)[1:-1])

    def written(self, before: "LogprobLists | None" = None) -> msgspec.Raw:
        """The whole object. `before`: lists that stand in front of these."""
        members = []
        for name, pieces in self._pieces.items():
            in_front = (before._pieces[name] or []) if before else []
            values = b"null" if pieces is None else b"[" + b",".join((*in_front, *pieces)) + b"]"
            members.append(msgspec.json.encode(name) + b":" + values)
        return msgspec.Raw(b"{" + b",".join(members) + b"}")
