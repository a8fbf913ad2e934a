"""How many blocks of KV cache a request takes: one count for those that refuse, place, reserve and compute."""


def blocks_of_request(num_prompt_tokens: int, max_tokens: int, num_choices: int, block_size_tokens: int) -> int:
    """Return the blocks that a request takes at most, all its choices together.

    Choices share blocks of the prompt (`num_shared_blocks`), and all go on from its last token.
    """
    shared = num_shared_blocks(num_prompt_tokens, block_size_tokens)
    each = -(-(num_prompt_tokens + max_tokens) // block_size_tokens) - shared
    return shared + num_choices * each


def most_tokens_within(num_blocks: int, num_prompt_tokens: int, num_choices: int, block_size_tokens: int) -> int:
    """Return how many tokens each choice may have so that `blocks_of_request` stays within `num_blocks`.

    Negative if not even the prompt fits.
    """
    shared = num_shared_blocks(num_prompt_tokens, block_size_tokens)
    each = (num_blocks - shared) // num_choices
    return (shared + each) * block_size_tokens - num_prompt_tokens


def num_shared_blocks(num_prompt_tokens: int, block_size_tokens: int) -> int:
    """Return how many blocks all choices of a request share: the full ones of the prompt, but for its last token."""
    return max(0, num_prompt_tokens - 1) // block_size_tokens
