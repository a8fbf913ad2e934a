"""Log-probabilities of one choice that grow token by token, kept as the JSON that they become.

An entry takes about 70 bytes so, where Python's values take 500: a request may ask for a million.
"""

from collections.abc import Iterator, Mapping, Sequence
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

    def written(self, before: "LogprobLists | None" = None) -> Iterator[bytes]:
        """The whole object, in pieces. `before`: lists that stand in front of these."""
        mark = b"{"
        for name, pieces in self._pieces.items():
            yield mark + msgspec.json.encode(name) + b":"
            mark = b","
            if pieces is None:
                yield b"null"
                continue
            yield b"["
            in_front = (before._pieces[name] or []) if before else []
            for number, piece in enumerate((*in_front, *pieces)):
                yield b"," + piece if number else piece
            yield b"]"
        yield b"}"
