"""`shoal up --model FOLDER` serves a folder of Hugging Face as transformers does."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

import shoal
from tests.fleet.conftest import Fleet
from tests.unit.tiny_models import reference_greedy, save, tiny_model
from tests.unit.tiny_tokenizers import KINDS

VOCABULARY, UNKNOWN_TO_THE_TOKENIZER, END = 300, 290, 299
NUM_TOKENS = 20
CHAT = "then an é in the 日本"


@dataclass(frozen=True, repr=False)
class Served:
    """A tiny model in a folder, as transformers has it, and the fleet that serves the folder."""

    name: str
    model: Any
    texts: Any
    ends: tuple[int, ...]
    """`eos_token_id` of generation_config.json: the second is one that the greedy answer to CHAT comes to."""
    fleet: Fleet

    def prompt(self, content: str) -> list[int]:
        token_ids: list[int] = self.texts.apply_chat_template(
            a_chat(content), add_generation_prompt=True, return_dict=False
        )
        return token_ids

    def expected(self, content: str) -> list[int]:
        """The greedy answer, whatever ends it."""
        return reference_greedy(self.model, self.prompt(content), NUM_TOKENS)

    def ask(self, content: str, **options: Any) -> shoal.Stream:
        with self.fleet.client() as client:
            stream = client.generate(messages=a_chat(content), max_tokens=NUM_TOKENS, temperature=0, **options)
            stream.read()
        return stream


MODELS = [("mistral-window", "sentencepiece"), ("qwen2-tied", "qwen2"), ("llama-tied-llama3-rope", "llama3")]


@pytest.fixture(scope="module", params=MODELS, ids=[name for name, _ in MODELS])
def served(
    request: pytest.FixtureRequest, start: Callable[..., Fleet], tmp_path_factory: pytest.TempPathFactory
) -> Served:
    name, tokenizer = request.param
    folder = tmp_path_factory.mktemp("models") / f"Tiny.{name}"
    model = tiny_model(name, vocab_size=VOCABULARY, eos_token_id=END)
    save(model, folder, max_shard_size="100KB")
    texts = KINDS[tokenizer](folder)
    prompt = texts.apply_chat_template(a_chat(CHAT), add_generation_prompt=True, return_dict=False)
    ends = (END, reference_greedy(model, prompt, 5)[-1])
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends, "temperature": 0.1}))
    return Served(name, model, texts, ends, start("--model", str(folder)))


def a_chat(content: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content}]


def test_a_chat_has_the_models_own_template_and_the_answer_of_transformers(served: Served) -> None:
    with served.fleet.client() as client:
        assert [model.name for model in client.list_models()] == [f"tiny.{served.name}"]
    stream = served.ask(CHAT, ignore_eos=True)
    assert list(stream.token_ids) == served.expected(CHAT)
    if served.name != "mistral-window":  # What halves of characters look like is not the same there.
        prompt = served.prompt(CHAT)
        shown = served.texts.decode([*prompt, *stream.token_ids], skip_special_tokens=True)
        assert stream.text == shown[len(served.texts.decode(prompt, skip_special_tokens=True)) :]


def test_an_answer_ends_where_the_generation_config_says(served: Served) -> None:
    expected = served.expected(CHAT)
    end = next(index for index, token_id in enumerate(expected) if token_id in served.ends)
    stream = served.ask(CHAT)
    assert list(stream.token_ids) == expected[: end + 1]
    assert stream.finished is not None
    assert stream.finished.reason is shoal.FinishReason.STOP


def test_a_beginning_found_in_the_cache_changes_nothing(served: Served) -> None:
    """Also where the prompt is longer than the window, and so what is found lies partly before it."""
    beginning = "in the 日本 then an é. " * 3
    for end, least_cached in (("the end", 0), ("no end", 32)):
        stream = served.ask(beginning + end, ignore_eos=True)
        assert stream.finished is not None
        assert stream.finished.usage.cached_tokens >= least_cached
        assert list(stream.token_ids) == served.expected(beginning + end)


def test_tokens_that_only_the_model_has_can_be_forced_and_forbidden(served: Served) -> None:
    stream = served.ask(CHAT, logit_bias={UNKNOWN_TO_THE_TOKENIZER: 100})
    assert (stream.token_ids, stream.text) == ((UNKNOWN_TO_THE_TOKENIZER,) * NUM_TOKENS, "")
    stream = served.ask(
        CHAT, logit_bias={UNKNOWN_TO_THE_TOKENIZER: 100}, response_format={"choices": ["the end", "then"]}
    )
    assert stream.text in ("the end", "then")
