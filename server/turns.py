"""Whose turn it is: a lock that goes round its users, and long loops that let others in between."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque

_ROUNDS = 16


class Turns:
    """Held by one at a time. Of the users that wait, the one that had it last is the last to have it again;
    within a user it is first come, first served."""

    def __init__(self) -> None:
        self._holder: str | None = None
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()

    async def acquire(self, user: str) -> None:
        if self._holder is None:
            self._holder = user
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(user, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # it was given to one that leaves
                self.release()
            raise

    def release(self) -> None:
        """To be called once by whoever holds it: the next one does from now on."""
        if self._holder is not None and self._holder in self._waiting:
            self._waiting.move_to_end(self._holder)
        self._holder = None
        while self._holder is None and self._waiting:
            user, theirs = next(iter(self._waiting.items()))
            turn = theirs.popleft()
            if not theirs:
                del self._waiting[user]
            if not turn.cancelled():  # else it has left
                turn.set_result(None)
                self._holder = user


async def others_turn(done: int) -> None:
    """Within a loop of which `done` rounds are done: every few rounds, whoever else is ready has a turn."""
    if done % _ROUNDS == 0:
        await asyncio.sleep(0)
