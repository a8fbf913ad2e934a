"""`shoal chat`: a conversation in the terminal."""

import argparse
import asyncio
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from services.common.errors import ShoalError
from shoal._async_client import AsyncClient
from shoal._prompt import Message, Options
from shoal.cli.asking import add_flags, answer_options, client_in_contact
from shoal.cli.streaming import show

_PROMPT = "\n> "


def add_to(commands: Any) -> None:
    """Declare the command."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "chat",
        help="talk to the model",
        description="A conversation. Ctrl-C cancels an answer, Ctrl-D ends the chat.",
        allow_abbrev=False,
    )
    parser.add_argument("--system", metavar="TEXT", help="the system message (the model's own)")
    add_flags(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace, given: Sequence[str]) -> int:
    """Ask and answer until the end of the input."""
    with suppress(ImportError):
        # Gives `input` line editing and a history.
        import readline  # noqa: F401
    messages: list[Message] = []
    if arguments.system is not None:
        messages.append({"role": "system", "content": arguments.system})
    options = answer_options(arguments)
    with asyncio.Runner() as runner:
        client = runner.run(client_in_contact(arguments))
        if sys.stdin.isatty():
            print("Ctrl-C cancels an answer, Ctrl-D ends the chat.")
        try:
            while (question := _ask()) is not None:
                if question.strip():
                    runner.run(_answer(client, messages, question, options))
        finally:
            runner.run(client.close())
    return 0


def _ask() -> str | None:
    """The next question; None at the end of the input."""
    while True:
        try:
            return input(_PROMPT if sys.stdin.isatty() else "")
        except EOFError:
            return None
        except KeyboardInterrupt:
            # Drops the line, as shells do.
            continue


async def _answer(client: AsyncClient, messages: list[Message], question: str, options: Options) -> None:
    """Show the answer, and keep question and answer for the next turn unless it failed."""
    asked: Message = {"role": "user", "content": question}
    try:
        async with client.generate(messages=[*messages, asked], **options) as stream:
            await show(stream, stats=False)
    except ShoalError as error:
        print(f"shoal: {error}", file=sys.stderr)
        return
    messages += [asked, {"role": "assistant", "content": stream.text}]
