"""The clients of a soak: they ask, compare, and count."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import httpx
from suites import replies
from suites.accounts import Told
from suites.replies import Reply, Said

from soaking.questions import Question

GONE = 499  # how the server counts a client that left before an answer


@dataclass(frozen=True)
class Differing:
    """An answer that is not that of the same request alone."""

    question: Question
    alone: list[Said]
    now: list[Said]


@dataclass
class Outcome:
    """What the clients of one stretch saw."""

    told: Told = field(default_factory=Told)  # of those that were not to be refused
    asked: list[Question] = field(default_factory=list)
    answers: Counter[tuple[str, str]] = field(default_factory=Counter)  # by route and status
    unsure: Counter[str] = field(default_factory=Counter)  # left while they were sent: by route
    kinds: Counter[str] = field(default_factory=Counter)
    pairs: Counter[tuple[str, str]] = field(default_factory=Counter)
    compared: Counter[str] = field(default_factory=Counter)  # by kind
    differing: list[Differing] = field(default_factory=list)
    late: list[Question] = field(default_factory=list)  # past their deadline
    faults: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)  # of requests that were answered

    @property
    def server_errors(self) -> int:
        return sum(count for (_, status), count in self.answers.items() if status >= "500")


class Load:
    """Clients of one server. `deadline`: seconds that a request may take; what is later counts as hung."""

    def __init__(self, deadline: float) -> None:
        self._deadline = deadline
        self.known: list[list[Said]] = []

    async def learn(self, client: httpx.AsyncClient, catalogue: Sequence[Question]) -> Outcome:
        """Asks the catalogue one by one; from now on its answers are known."""
        outcome = Outcome()
        self.known = []
        for question in catalogue:
            reply = await self._ask(client, question, outcome)
            self.known.append([] if reply is None else reply.said())
        return outcome

    async def run(
        self, client: httpx.AsyncClient, next_one: Callable[[], Question | None], clients: int
    ) -> Outcome:
        """So many clients ask one request after the other, until there is none."""
        outcome = Outcome()

        async def one() -> None:
            while (question := next_one()) is not None:
                await self._ask(client, question, outcome)

        await asyncio.gather(*(one() for _ in range(clients)))
        return outcome

    async def _ask(self, client: httpx.AsyncClient, question: Question, outcome: Outcome) -> Reply | None:
        """Asks, counts and compares. None if there was no answer in time, or none at all."""
        outcome.kinds[question.kind] += 1
        if question.pair is not None:
            outcome.pairs[question.pair] += 1
        if question.status == 200:
            outcome.asked.append(question)
        began, ask = time.monotonic(), question.ask
        try:
            async with asyncio.timeout(self._deadline):
                reply = await replies.ask(client, ask.path, ask.body, ask.leave_after)
        except TimeoutError:
            outcome.late.append(question)
            return None
        except httpx.HTTPError as error:
            outcome.faults.append(f"{type(error).__name__}: {error} for {ask}"[:1000])
            return None
        if reply.status or reply.sent:
            outcome.answers[ask.path, str(reply.status or GONE)] += 1
        else:
            outcome.unsure[ask.path] += 1
        if not reply.left:
            outcome.seconds.append(time.monotonic() - began)
        self._judge(question, reply, outcome)
        return reply

    def _judge(self, question: Question, reply: Reply, outcome: Outcome) -> None:
        if question.status != 200:
            if reply.status != question.status:
                outcome.faults.append(f"{reply.status} {reply.fault}, not refused: {question.ask}"[:1000])
            return
        outcome.told.take(reply)
        if reply.fault is not None:
            outcome.faults.append(f"{reply.status} {reply.fault} for {question.ask}"[:1000])
        elif question.known is not None and question.known < len(self.known):
            alone, now = self.known[question.known], reply.said()
            outcome.compared[question.kind] += 1
            if alone != now:
                outcome.differing.append(Differing(question, alone, now))
