"""What llguidance and xgrammar cost: `python -m benchmarks.grammar`. Needs the model's package, and both libraries.

Each library is measured in a process of its own, for the default model's vocabulary of 49,152 byte-level tokens: what
it adds to a process, how long formats take to compile, how long the mask of one token takes. Masks are taken along
JSON documents as the model's own tokenizer cuts them, and along random walks under the masks themselves. Neither has
the machine to itself, so the libraries take turns and the better of the turns counts. A library that is not installed
is left out. Prints one table.
"""

import argparse
import importlib.util
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from services.common.model.gguf import read_gguf
from services.common.model.location import default_model_path
from services.common.text.vocabulary import Vocabulary, read_vocabulary

LIBRARIES = ("llguidance", "xgrammar")
TURNS = 3
WALKS, WALK_TOKENS = 20, 60
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 40},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "role": {"enum": ["admin", "editor", "reader"]},
        "address": {
            "type": "object",
            "properties": {"street": {"type": "string"}, "zip": {"type": "string", "pattern": "^[0-9]{5}$"}},
            "required": ["street", "zip"],
            "additionalProperties": False,
        },
        "scores": {"type": "array", "items": {"type": "number"}, "minItems": 1, "maxItems": 8},
    },
    "required": ["name", "age", "role", "address", "scores"],
    "additionalProperties": False,
}
LARGE = {
    "type": "object",
    "properties": {f"field_{number}": PERSON for number in range(100)},
    "required": [f"field_{number}" for number in range(100)],
}
CHOICES = [f"choice number {number} of many" for number in range(1_024)]
REFUSED = {
    "minimum above maximum": {"type": "integer", "minimum": 5, "maximum": 3},
    "a required property that is false": {"type": "object", "properties": {"a": False}, "required": ["a"]},
    "all of a string and a number": {"allOf": [{"type": "string"}, {"type": "number"}]},
    "uniqueItems": {"type": "array", "items": {"type": "integer"}, "uniqueItems": True},
    "an unknown type": {"type": "strin"},
}


class Mask(Protocol):
    """One answer under a format."""

    def bitmask(self) -> bytes: ...
    def accept(self, token: int) -> None: ...


class Library(Protocol):
    """What both libraries do."""

    def json_schema(self, schema: object) -> Callable[[], Mask]: ...
    def regex(self, regex: str) -> Callable[[], Mask]: ...
    def choices(self, texts: Sequence[str]) -> Callable[[], Mask]: ...


class Llguidance:
    def __init__(self, vocabulary: Vocabulary) -> None:
        import llguidance

        self._library: Any = llguidance

        class Tokens:
            is_tokenizer_wrapper = True
            eos_token_id = vocabulary.end_token_ids[0]
            bos_token_id = None
            tokens = vocabulary.token_bytes
            special_token_ids = tuple(number for number, spelled in enumerate(tokens) if not spelled)

            def __call__(self, text: bytes) -> list[int]:
                return []

        self._tokenizer = llguidance.LLTokenizer(Tokens(), n_vocab=vocabulary.num_tokens)

    def json_schema(self, schema: object) -> Callable[[], Mask]:
        return self._compiled(f"%json {json.dumps(schema)}")

    def regex(self, regex: str) -> Callable[[], Mask]:
        return self._compiled(f"/{self._library.regex_to_lark(regex)}/")

    def choices(self, texts: Sequence[str]) -> Callable[[], Mask]:
        return self._compiled(" | ".join(map(json.dumps, texts)))

    def _compiled(self, start: str) -> Callable[[], Mask]:
        # Without this it forces what only one text can follow, in tokens that it asks a tokenizer for.
        grammar = f'%llguidance {{"no_forcing": true}}\nstart: {start}'
        compiled = self._library.LLMatcher(self._tokenizer, grammar, log_level=0)
        if compiled.is_error():
            raise ValueError(compiled.get_error())

        class State:
            def __init__(self) -> None:
                self._matcher = compiled.deep_copy()

            def bitmask(self) -> bytes:
                return self._matcher.compute_bitmask()  # type: ignore[no-any-return]

            def accept(self, token: int) -> None:
                assert self._matcher.consume_token(token)

        return State


class Xgrammar:
    def __init__(self, vocabulary: Vocabulary) -> None:
        import xgrammar

        self._library: Any = xgrammar
        self._num_tokens = vocabulary.num_tokens
        information = xgrammar.TokenizerInfo(
            list(vocabulary.token_bytes), xgrammar.VocabType.RAW, stop_token_ids=list(vocabulary.end_token_ids)
        )
        self._compiler = xgrammar.GrammarCompiler(information, cache_enabled=False)

    def json_schema(self, schema: object) -> Callable[[], Mask]:
        return self._state(self._compiler.compile_json_schema(json.dumps(schema)))

    def regex(self, regex: str) -> Callable[[], Mask]:
        return self._state(self._compiler.compile_regex(regex))

    def choices(self, texts: Sequence[str]) -> Callable[[], Mask]:
        return self._state(self._compiler.compile_grammar(f"root ::= {' | '.join(map(json.dumps, texts))}"))

    def _state(self, compiled: Any) -> Callable[[], Mask]:
        library, num_tokens = self._library, self._num_tokens

        class State:
            def __init__(self) -> None:
                self._matcher = library.GrammarMatcher(compiled)
                self._words = library.allocate_token_bitmask(1, num_tokens)

            def bitmask(self) -> bytes:
                self._matcher.fill_next_token_bitmask(self._words)
                return self._words.numpy().tobytes()  # type: ignore[no-any-return]

            def accept(self, token: int) -> None:
                assert self._matcher.accept_token(token)

        return State


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", choices=LIBRARIES, help="one library, in this process; prints JSON")
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure)))
        return
    found = [library for library in LIBRARIES if importlib.util.find_spec(library)]
    turns: dict[str, list[dict[str, float | str]]] = {library: [] for library in found}
    for _ in range(TURNS):
        for library in found:
            command = [sys.executable, "-m", "benchmarks.grammar", "--measure", library]
            turns[library].append(json.loads(subprocess.run(command, capture_output=True, check=True).stdout))
    print(f"| what | {' | '.join(found)} |\n|---|{'---|' * len(found)}")
    for what in turns[found[0]][0]:
        print(f"| {what} | {' | '.join(_best([turn[what] for turn in turns[library]]) for library in found)} |")


def measure(name: str) -> dict[str, float | str]:
    """All figures of one library, by what they say."""
    vocabulary = read_vocabulary(read_gguf(default_model_path()))
    before_bytes, before_s = _resident_bytes(), time.perf_counter()
    library: Library = Llguidance(vocabulary) if name == "llguidance" else Xgrammar(vocabulary)
    figures: dict[str, float | str] = {
        "import and vocabulary, ms": _ms_since(before_s),
        "import and vocabulary, MB resident": (_resident_bytes() - before_bytes) / 1e6,
    }
    formats: dict[str, Callable[[], Callable[[], Mask]]] = {
        "any object": lambda: library.json_schema({"type": "object"}),
        "a small schema (700 bytes)": lambda: library.json_schema(PERSON),
        "a large schema (70 kB)": lambda: library.json_schema(LARGE),
        "a regex": lambda: library.regex(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}(:[0-9]{2})?Z"),
        "1,024 choices": lambda: library.choices(CHOICES),
    }
    compiled = {}
    for what, compile_format in formats.items():
        began_s = time.perf_counter()
        compiled[what] = compile_format()
        figures[f"compile {what}, ms"] = _ms_since(began_s)
    began_s = time.perf_counter()
    states = [compiled["a small schema (700 bytes)"]() for _ in range(100)]
    figures["one more answer under the small schema, ms"] = _ms_since(began_s) / len(states)
    figures |= _mask_figures("any object, documents", [_along(compiled["any object"](), t) for t in _documents()])
    small = compiled["a small schema (700 bytes)"]
    figures |= _mask_figures("small schema, documents", [_along(small(), tokens) for tokens in _documents()])
    figures |= _mask_figures("small schema, random walks", [_walk(small(), seed, vocabulary) for seed in range(WALKS)])
    figures |= _mask_figures("1,024 choices, random walks", [
        _walk(compiled["1,024 choices"](), seed, vocabulary) for seed in range(WALKS)
    ])  # fmt: skip
    figures["all of it, MB resident"] = (_resident_bytes() - before_bytes) / 1e6
    for what, schema in REFUSED.items():
        figures[f"answer to {what}"] = _refusal(library, schema)
    return figures


def _documents() -> list[list[int]]:
    """Documents that fit PERSON, compact, as the model's tokenizer cuts them."""
    from services.tokenizer.encoding import build_tokenizer

    rng = random.Random(1)
    # No quotes: xgrammar takes no escapes in a string whose length is bounded.
    words = [word for word in Path(__file__).read_text().split() if word.isalpha()]
    tokenizer = build_tokenizer(read_gguf(default_model_path()))
    documents = [
        {
            "name": " ".join(rng.choices(words, k=3))[:40],
            "age": rng.randrange(150),
            "role": rng.choice(["admin", "editor", "reader"]),
            "address": {"street": " ".join(rng.choices(words, k=6)), "zip": f"{rng.randrange(100_000):05}"},
            "scores": [round(rng.uniform(-100, 100), 3) for _ in range(rng.randint(1, 8))],
        }
        for _ in range(20)
    ]
    return [tokenizer.encode(json.dumps(document, ensure_ascii=False)).ids for document in documents]


def _along(state: Mask, tokens: Sequence[int]) -> list[float]:
    """Milliseconds of each mask."""
    took_ms = []
    for token in tokens:
        began_s = time.perf_counter()
        mask = state.bitmask()
        took_ms.append(_ms_since(began_s))
        assert mask[token // 8] >> token % 8 & 1
        state.accept(token)
    return took_ms


def _walk(state: Mask, seed: int, vocabulary: Vocabulary) -> list[float]:
    rng, took_ms = random.Random(seed), []
    for _ in range(WALK_TOKENS):
        began_s = time.perf_counter()
        mask = state.bitmask()
        took_ms.append(_ms_since(began_s))
        token = rng.choice([token for token in range(vocabulary.num_tokens) if mask[token // 8] >> token % 8 & 1])
        if token in vocabulary.end_token_ids:
            break
        state.accept(token)
    return took_ms


def _mask_figures(what: str, runs: Sequence[Sequence[float]]) -> dict[str, float | str]:
    ordered = sorted(took_ms for run in runs for took_ms in run)
    return {
        f"mask, {what}: mean, ms": statistics.mean(ordered),
        f"mask, {what}: p99, ms": ordered[len(ordered) * 99 // 100],
        f"mask, {what}: worst, ms": ordered[-1],
    }


def _refusal(library: Library, schema: object) -> str:
    try:
        mask = library.json_schema(schema)().bitmask()
    except Exception as error:  # noqa: BLE001 - whatever it raises is the answer
        return f"{type(error).__name__}: {str(error).splitlines()[0][:70]}"
    return "taken" if any(mask) else "taken; nothing is allowed"


def _best(values: Sequence[float | str]) -> str:
    numbers = [value for value in values if isinstance(value, float)]
    return f"{min(numbers):.3g}" if numbers else str(values[0])


def _ms_since(began_s: float) -> float:
    return 1000 * (time.perf_counter() - began_s)


def _resident_bytes() -> int:
    import psutil

    return psutil.Process().memory_info().rss


if __name__ == "__main__":
    main()
