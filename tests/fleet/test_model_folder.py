"""`shoal up --model FOLDER` serves a folder of Hugging Face as transformers computes it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fleet.conftest import Fleet
from tests.unit.tiny_models import reference_greedy, save, tiny_model
from tests.unit.tiny_tokenizers import KINDS

VOCABULARY, END, NUM_TOKENS = 300, 299, 20


@pytest.mark.parametrize(
    ("name", "tokenizer"),
    [("mistral-window", "sentencepiece"), ("qwen2-tied", "qwen2"), ("llama-tied-llama3-rope", "llama3")],
)
def test_it_answers_as_transformers_does(
    start: Callable[..., Fleet], tmp_path: Path, name: str, tokenizer: str
) -> None:
    folder = tmp_path / f"Tiny.{name}"
    model = tiny_model(name, vocab_size=VOCABULARY, eos_token_id=END)
    save(model, folder, max_shard_size="100KB")
    texts = KINDS[tokenizer](folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [END]}))
    messages = [{"role": "user", "content": "then an é in the 日本"}]
    prompt = texts.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    expected = reference_greedy(model, prompt, NUM_TOKENS)
    with start("--model", str(folder)).client() as client:
        assert [served.name for served in client.list_models()] == [f"tiny.{name}"]
        stream = client.generate(messages=messages, temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
        text = stream.read()
    assert list(stream.token_ids) == expected
    if tokenizer != "sentencepiece":  # What halves of characters look like is not the same there.
        shown = texts.decode([*prompt, *expected], skip_special_tokens=True)
        assert text == shown[len(texts.decode(prompt, skip_special_tokens=True)) :]
