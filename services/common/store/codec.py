"""Values as Redis holds them: tokens, decisions, whole records."""

import struct
from collections.abc import Mapping, Sequence

from services.common.ids import RequestKey, WorkerId
from services.common.record.record import Attempt, Decision, Record
from services.common.record.states import RequestState


def pack_tokens(tokens: Sequence[int]) -> bytes:
    """4 bytes a token, little-endian. Raises ValueError outside 0..2**32-1."""
    try:
        return struct.pack(f"<{len(tokens)}I", *tokens)
    except struct.error as error:
        raise ValueError(f"a token id is not in 0..{2**32 - 1}") from error


def unpack_tokens(packed: bytes) -> tuple[int, ...]:
    """The opposite of `pack_tokens`."""
    return struct.unpack(f"<{len(packed) // 4}I", packed)


def unpack_decisions(text: str) -> tuple[Decision, ...]:
    """Lines of `at_ms|what|attempt|detail`; in the detail, backslash and line feed are escaped by a backslash."""
    decisions = []
    for line in text.split("\n") if text else ():
        at_ms, what, attempt, detail = line.split("|", 3)
        decisions.append(Decision(int(at_ms), what, int(attempt), _unescaped(detail)))
    return tuple(decisions)


def unpack_record(key: RequestKey, fields: Mapping[bytes, bytes], journal: Sequence[bytes]) -> Record:
    """A record from its hash, and its journal's strings, one a choice."""

    def text(name: str) -> str:
        return fields.get(name.encode(), b"").decode()

    def number(name: str) -> int:
        return int(fields.get(name.encode(), b"0"))

    return Record(
        key=key,
        state=RequestState(text("state")),
        attempt=Attempt(number("attempt"), text("nonce")),
        digest=text("digest"),
        payload=fields[b"payload"],
        num_choices=number("n"),
        accepted_at_ms=number("accepted_at_ms"),
        deadline_at_ms=number("deadline_at_ms"),
        resume_ms=number("resume_ms"),
        gateway=text("gateway"),
        reader=number("reader"),
        reader_left_at_ms=number("reader_left_at_ms"),
        journal=tuple(unpack_tokens(packed) for packed in journal),
        tokens_per_minute=number("tokens_per_minute"),
        reserved_tokens=number("reserved_tokens"),
        worker=WorkerId(text("worker")),
        placed_at_ms=number("placed_at_ms"),
        ended_at_ms=number("ended_at_ms"),
        cancel=bool(number("cancel")),
        suspect_until=number("suspect_until"),
        outcome=fields.get(b"outcome", b""),
        error=text("error"),
        decisions=unpack_decisions(text("decisions")),
    )


def pairs(flat: Sequence[bytes]) -> dict[bytes, bytes]:
    """Fields of a hash or stream entry, given as name, value, name, value, ..."""
    return dict(zip(flat[::2], flat[1::2], strict=True))


def _unescaped(detail: str) -> str:
    return "\\".join(part.replace("\\n", "\n") for part in detail.split("\\\\"))
