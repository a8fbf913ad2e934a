"""The patterns by which models split text into words before BPE, as in their own tokenizer.json."""

from tokenizers import Regex, pre_tokenizers

_BEFORE_DIGITS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_SPACES = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_AFTER_DIGITS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*" + _SPACES
LLAMA3_PATTERN = _BEFORE_DIGITS + r"\p{N}{1,3}" + _AFTER_DIGITS
QWEN2_PATTERN = _BEFORE_DIGITS + r"\p{N}" + _AFTER_DIGITS
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
TEKKEN_PATTERN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _SPACES
)
"""Of Mistral's models since Nemo. A word also ends before a capital."""


def split_by(pattern: str) -> pre_tokenizers.PreTokenizer:
    """Return the step that splits text by a pattern and writes each part in the byte-level alphabet."""
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
