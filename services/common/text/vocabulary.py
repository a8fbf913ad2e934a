"""What each token says: its bytes, and which tokens say nothing or end an answer."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The bytes of every token, by id; none for a special token, which is never shown.

    A token's bytes need not be whole UTF-8 characters. `end_token_ids` end an answer.
    """

    token_bytes: tuple[bytes, ...]
    end_token_ids: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        """Token ids are below this."""
        return len(self.token_bytes)
