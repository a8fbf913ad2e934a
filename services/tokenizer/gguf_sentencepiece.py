"""A sentencepiece tokenizer out of a GGUF file's metadata: tokens with scores, of Llama 2 and Mistral.

Sentencepiece joins whichever two neighbours make the token of the highest score. The tokenizers library joins by a list
of pairs, the best first: so the list has, for each token, all pairs that make it, by the token's score.
"""

from collections.abc import Container, Iterator

from tokenizers import Tokenizer, models, normalizers

from services.common.model.errors import ModelFileError
from services.common.model.gguf import GgufFile
from services.common.text.gguf_vocabulary import NORMAL, UNKNOWN
from services.common.text.sentencepiece import SPACE

SPACE_KEY = "tokenizer.ggml.add_space_prefix"


def build_sentencepiece(file: GgufFile) -> Tokenizer:
    """Build a tokenizer; added tokens are the caller's. Raises ModelFileError if the file contradicts itself."""
    tokens = file.require_tuple("tokenizer.ggml.tokens", str)
    scores = file.require_tuple("tokenizer.ggml.scores", float)
    kinds = file.require_tuple("tokenizer.ggml.token_type", int)
    if len(scores) != len(tokens):
        raise ModelFileError(file.path, f"it has {len(tokens)} tokens, but scores for {len(scores)}")
    score_of = {token: score for token, score, kind in zip(tokens, scores, kinds, strict=True) if kind == NORMAL}
    best_first = sorted(score_of, key=score_of.__getitem__, reverse=True)
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: token_id for token_id, token in enumerate(tokens)},
            merges=[pair for token in best_first for pair in _pairs(token, score_of)],
            unk_token=tokens[kinds.index(UNKNOWN)] if UNKNOWN in kinds else None,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    begins_with_space = file.require(SPACE_KEY, bool) if SPACE_KEY in file.metadata else True
    spaces = normalizers.Replace(" ", SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces]) if begins_with_space else spaces
    return tokenizer


def _pairs(token: str, known: Container[str]) -> Iterator[tuple[str, str]]:
    """All pairs of known tokens that make this one."""
    for place in range(1, len(token)):
        if token[:place] in known and token[place:] in known:
            yield token[:place], token[place:]
