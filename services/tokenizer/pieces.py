"""Cuts a long text where no token can reach over the cut, so that encoding it takes memory for one piece at a time.

The tokenizers library keeps over 100 bytes for each token of a text until it is done: 0.5 GB for 4 MiB of text in one
piece, 30 MB in pieces, which together take no longer.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

from tokenizers import Tokenizer

from services.tokenizer.split_patterns import LLAMA3_PATTERN, QWEN2_PATTERN

PIECE_CHARS = 1 << 14
# The patterns of GPT-2, Llama 3 and Qwen2 all end a word after a run of letters, whatever is before it, unless another
# letter follows; and white space with letters behind it, or punctuation, begins the next. So the tokens of the whole
# are those of the parts. Only letters that every version of Unicode calls so; no apostrophe: "'s" is one word.
_LETTERS = "A-Za-zА-яぁ-ゖァ-ヺ一-龥가-힣"
_CUT = re.compile(f"(?<=[{_LETTERS}])(?=[ \n][{_LETTERS}]|[.,;!?。、，！？])")


def may_be_cut(tokenizer: Tokenizer) -> bool:
    """Whether `cut_text` changes no token: if the tokenizer splits by a known pattern and has no token over a cut."""
    added = tokenizer.get_added_tokens_decoder().values()
    return (
        _normalizes_locally(tokenizer)
        and _splits_by_known_pattern(tokenizer)
        and not any(_CUT.search(token.content) or token.lstrip or token.rstrip or token.single_word for token in added)
    )


def cut_text(text: str, piece_chars: int = PIECE_CHARS) -> Iterator[str]:
    """Yield parts that make up the text, of about `piece_chars` characters; longer where there is no place to cut."""
    start = 0
    while len(text) - start > piece_chars:
        place = _CUT.search(text, start + piece_chars)
        if place is None:
            break
        yield text[start : place.start()]
        start = place.start()
    yield text[start:]


def _normalizes_locally(tokenizer: Tokenizer) -> bool:
    # NFC joins no letter with the white space or punctuation behind it.
    return tokenizer.normalizer is None or _described(tokenizer.normalizer) == {"type": "NFC"}


def _splits_by_known_pattern(tokenizer: Tokenizer) -> bool:
    if tokenizer.pre_tokenizer is None:
        return False
    description = _described(tokenizer.pre_tokenizer)
    *before, last = description["pretokenizers"] if description["type"] == "Sequence" else [description]
    if last["type"] != "ByteLevel" or last["add_prefix_space"]:
        return False
    patterns = [step["pattern"]["Regex"] for step in before if step["type"] == "Split" and "Regex" in step["pattern"]]
    if last["use_regex"]:
        return all(step["type"] == "Digits" for step in before)
    return len(before) == 1 and patterns in ([LLAMA3_PATTERN], [QWEN2_PATTERN])


def _described(part: Any) -> dict[str, Any]:
    """A part of a tokenizer, as tokenizer.json has it: its pickled state is that."""
    description: dict[str, Any] = json.loads(part.__getstate__())
    return description
