"""`shoal generate`: one answer, or many."""

import argparse
import asyncio
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TextIO

from shoal._retries import RetryPolicy
from shoal.cli.asking import add_flags, answer_options, client_in_contact
from shoal.cli.batch import run_batch
from shoal.cli.results import result_of
from shoal.cli.streaming import show
from shoal.fleet.errors import FleetError

_ABOUT = """Streams the answer to one prompt, given as the argument or on standard input. Or answers the cases of
--input: a JSON object a line, with prompt, messages or token_ids, and any of the settings below by their names
(max_tokens, ...); --output gets a line for each, in the same order."""
CANCELLED = 130
PATIENT = RetryPolicy(outage_limit_s=300, retry_exhausted=True)
"""Nobody waits in front of a batch: it waits for a full queue."""


def add_to(commands: Any) -> None:
    """Declare the command."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "generate", help="answer one prompt, or a file of them", description=_ABOUT, allow_abbrev=False
    )
    parser.add_argument("prompt", nargs="?", help="the text to go on with (standard input)")
    parser.add_argument("--chat", action="store_true", help="the prompt is a user's message, not raw text")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.add_argument("--stats", action="store_true", help="say on standard error how long it took")
    parser.add_argument("--input", metavar="FILE", help="cases, a JSON object a line; -: standard input")
    parser.add_argument("--output", metavar="FILE", default="-", help="results, a JSON object a line (standard output)")
    parser.add_argument("--concurrency", type=int, default=8, metavar="N", help="cases answered at once (8)")
    parser.add_argument("--n", type=int, help="number of answers to one prompt; with --json or --input (1)")
    parser.add_argument("--logprobs", type=int, metavar="K", help="tell each token's log-probability and the K best")
    parser.add_argument("--prompt-logprobs", type=int, metavar="K", help="the same for the prompt's tokens")
    add_flags(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace, given: Sequence[str]) -> int:
    """Answer. Status 1 if a case failed."""
    if arguments.input is None and not arguments.json:
        for flag in ("n", "logprobs", "prompt_logprobs"):
            if getattr(arguments, flag) is not None:
                raise FleetError(f"--{flag.replace('_', '-')} has no place in plain text: add --json")
    if arguments.input is None:
        return asyncio.run(_one(arguments))
    if arguments.prompt is not None:
        raise FleetError("give a prompt or --input, not both")
    if arguments.concurrency < 1:
        raise FleetError(f"--concurrency is {arguments.concurrency}; the least is 1")
    return asyncio.run(_many(arguments))


async def _one(arguments: argparse.Namespace) -> int:
    prompt = sys.stdin.read() if arguments.prompt is None else arguments.prompt
    asked = {"messages": [{"role": "user", "content": prompt}]} if arguments.chat else {"prompt": prompt}
    options = answer_options(arguments)
    async with await client_in_contact(arguments) as client, client.generate(**asked, **options) as stream:
        if not arguments.json:
            return 0 if await show(stream, stats=arguments.stats) else CANCELLED
        await stream.read()
    print(json.dumps(result_of(stream), ensure_ascii=False))
    return 0


async def _many(arguments: argparse.Namespace) -> int:
    with _opened(arguments.input, "r") as cases, _opened(arguments.output, "w") as results:
        async with await client_in_contact(arguments, PATIENT) as client:
            num_failed = await run_batch(client, cases, results.write, arguments.concurrency, answer_options(arguments))
    if num_failed:
        print(f"shoal: {num_failed} cases failed; their results have an `error`", file=sys.stderr)
    return 1 if num_failed else 0


@contextmanager
def _opened(name: str, mode: str) -> Iterator[TextIO]:
    if name == "-":
        yield sys.stdin if mode == "r" else sys.stdout
        return
    with ExitStack() as stack:
        try:
            file = stack.enter_context(Path(name).open(mode, encoding="utf-8"))
        except OSError as error:
            raise FleetError(f"{name} can't be opened: {error.strerror}") from error
        yield file  # type: ignore[misc]
