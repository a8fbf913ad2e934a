"""Tiny tokenizers of each kind, as transformers saves them beside a model."""

import json
import warnings
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, processors

from services.common.text.byte_level import byte_level_alphabet
from services.tokenizer.split_patterns import LLAMA3_PATTERN, split_by

TEMPLATE = "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}<|assistant|>"
_MERGES = [("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("a", "n"), ("Ġ", "an"), ("Ã", "©"), ("i", "n"), (".", "x")]


def llama3(folder: Path) -> Any:
    """Byte-level, split by Llama 3's pattern, with a token at the beginning of each prompt."""
    tokenizer = Tokenizer(models.BPE(vocab=_byte_level_vocabulary(), merges=_MERGES, ignore_merges=True))
    tokenizer.pre_tokenizer = split_by(LLAMA3_PATTERN)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|begin|>", "<|end|>", "<|user|>", "<|assistant|>"])
    tokenizer.add_tokens([AddedToken("two  words", normalized=False)])
    begin = tokenizer.token_to_id("<|begin|>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", pair="<|begin|> $A $B", special_tokens=[("<|begin|>", begin)]
    )
    return _save(folder, _transformers().PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|begin|>"))


def qwen2(folder: Path) -> Any:
    """Byte-level, with texts normalized to NFC, and nothing added to prompts."""
    tokenizer = _transformers().Qwen2Tokenizer(
        vocab=_byte_level_vocabulary() | {"<|endoftext|>": 264}, merges=_MERGES, bos_token="<|endoftext|>"
    )
    return _save(folder, tokenizer)


def sentencepiece(folder: Path) -> Any:
    """Spaces written as `▁`, and bytes as tokens, as of Llama 2 and Mistral."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    tokens += ["t", "h", "e", "a", "n", "▁t", "he", "▁the", "an", "▁an", "▁▁"]
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("a", "n"), ("▁", "an"), ("▁", "▁")]
    tokenizer = _transformers().LlamaTokenizer(vocab={token: n for n, token in enumerate(tokens)}, merges=merges)
    begin = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)])
    tokenizer._tokenizer.post_processor = begin
    return _save(folder, tokenizer)


KINDS = {"llama3": llama3, "qwen2": qwen2, "sentencepiece": sentencepiece}


def write_configs(folder: Path, **changes: object) -> Path:
    """The two configurations that a tokenizer's reader looks into."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"vocab_size": 300, "max_position_embeddings": 128, "eos_token_id": 2} | changes
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 1]}))
    return folder


def _byte_level_vocabulary() -> dict[str, int]:
    tokens = [*byte_level_alphabet().values(), *(left + right for left, right in _MERGES)]
    return {token: number for number, token in enumerate(tokens)}


def _save(folder: Path, tokenizer: Any) -> Any:
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return tokenizer


def _transformers() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Of its own imports.
        import transformers
    return transformers
