"""What a model's files say about turning text into tokens."""

from dataclasses import dataclass

from tokenizers import Tokenizer

from services.tokenizer.chat_template import ChatTemplate


@dataclass(frozen=True, slots=True)
class ModelTokenizer:
    """A tokenizer, a chat template, and what is added to a prompt (a template writes such tokens itself)."""

    tokenizer: Tokenizer
    template: ChatTemplate | None
    """None: the model takes prompts only."""
    prompt_prefix: tuple[int, ...] = ()
    prompt_suffix: tuple[int, ...] = ()
