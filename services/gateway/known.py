"""Which requests are known already: looked up together, since all clients of a flood may ask at once."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from copy import copy

from services.common.errors import ShoalError
from services.common.ids import RequestKey
from services.common.store.requests import Peek
from services.gateway.store_retry import retried

PAUSE_S = 0.02
"""Between two readings, so that in a flood many share one; a question after a quiet time is answered at once."""


class KnownRequests:
    """Looks up requests of this pool, all that were asked for since the last reading in one."""

    def __init__(self, peek: Callable[[Sequence[RequestKey]], Awaitable[list[Peek | None]]]) -> None:
        """`peek`: reads where requests stand."""
        self._peek = peek
        self._asked: list[_Question] = []
        self._wanted = asyncio.Event()

    async def knows(self, key: RequestKey) -> bool:
        """Whether there is a record of it. Raises Unavailable while Redis is away."""
        answer: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._asked.append((key, answer))
        self._wanted.set()
        return await answer

    async def run(self) -> None:
        """Answer, until cancelled."""
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            asked, self._asked = self._asked, []
            await self._answer(asked)
            await asyncio.sleep(PAUSE_S)

    async def _answer(self, asked: "list[_Question]") -> None:
        try:
            peeks = await retried(lambda: self._peek([key for key, _ in asked]))
        except ShoalError as error:
            for _, answer in asked:
                if not answer.done():  # else its call was cancelled
                    answer.set_exception(copy(error))
        else:
            for (_, answer), peek in zip(asked, peeks, strict=True):
                if not answer.done():
                    answer.set_result(peek is not None)


_Question = tuple[RequestKey, asyncio.Future[bool]]
