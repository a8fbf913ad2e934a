"""Several answers at once: `python examples/async_client.py HOST:PORT`. The slowest is cancelled after two seconds."""

import asyncio
import sys

import shoal

PROMPTS = ["The sea is", "A good bridge", "Once upon a time", "To boil an egg,"]


async def main() -> None:
    async with shoal.AsyncClient(sys.argv[1]) as client, asyncio.TaskGroup() as tasks:
        for prompt in PROMPTS:
            tasks.create_task(answer(client, prompt))


async def answer(client: shoal.AsyncClient, prompt: str) -> None:
    stream = client.generate(prompt, temperature=0, max_tokens=48)
    try:
        async with asyncio.timeout(2):
            await stream.read()
    except TimeoutError:
        await stream.cancel()
        await stream.read()
    reason = stream.finished.reason if stream.finished else None
    print(f"{prompt}{stream.text}\n[{reason}]\n")


asyncio.run(main())
