"""Whose grammar is compiled next: clients with different keys take turns."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from engine.types import CompiledGrammar
from server.grammar import GrammarCompiler, Structure, _Lane
from server.grammar_messages import Answer
from server.turns import Turns

HEAVY, LIGHT = "heavy", "light"


async def rounds(n: int) -> None:
    """Of the event loop: no clock has a say."""
    for _ in range(n):
        await asyncio.sleep(0)


class Scripted(GrammarCompiler):
    """Notes what it tries, and takes its time for each."""

    def __init__(self) -> None:
        super().__init__(None, seconds=60.0, max_bytes=100, vocab_size=lambda: 0)  # type: ignore[arg-type]
        self.tried: tuple[list[str], list[str]] = [], []  # in the light lane, in the heavy one
        self.most = 0
        self.now = [0, 0]

    async def _tried(self, structure: Structure, lane: _Lane) -> Answer:
        at = self._lanes.index(lane)
        self.tried[at].append(structure.text)
        self.now[at] += 1
        self.most = max(self.most, self.now[at])
        await rounds(20)
        self.now[at] -= 1
        if structure.text.startswith(HEAVY) and at == 0:
            return Answer(refused="too long", beyond=True)
        return Answer(structure.text.encode())


def asks(compiler: GrammarCompiler) -> Callable[[str, str], asyncio.Task[CompiledGrammar]]:
    return lambda name, text: asyncio.create_task(compiler.compile(Structure("regex", text, "regex"), name))


@pytest.mark.parametrize("kind", [HEAVY, LIGHT])
async def test_another_keys_grammar_waits_for_one_try_at_most(kind: str):
    compiler = Scripted()
    ask = asks(compiler)
    flood = [ask("a", f"{kind}{i}") for i in range(30)]
    await rounds(5)
    for other in ("b", "c", ""):
        before = len(compiler.tried[0])
        assert (await ask(other, f"light of {other}")).data
        assert compiler.tried[0].index(f"light of {other}") <= before + 1
    assert not all(task.done() for task in flood)
    assert all([found.data for found in await asyncio.gather(*flood)])
    assert [text for text in compiler.tried[0] if text.startswith(kind) and text[-1].isdigit()] == [
        f"{kind}{i}" for i in range(30)
    ]
    assert compiler.most == 1


async def test_another_keys_heavy_grammar_waits_for_one_heavy_one_at_most():
    compiler = Scripted()
    ask = asks(compiler)
    flood = [ask("a", f"{HEAVY}{i}") for i in range(10)]
    while not compiler.tried[1]:
        await rounds(1)
    assert (await ask("b", f"{HEAVY} of b")).data
    assert not all(task.done() for task in flood)
    await asyncio.gather(*flood)
    assert compiler.tried[1].index(f"{HEAVY} of b") <= 3  # it was tried in the light lane first


async def test_a_grammar_that_another_key_waits_for_too_is_compiled_by_whose_turn_comes_first():
    compiler = Scripted()
    ask = asks(compiler)
    flood = [ask("a", text) for text in [f"{HEAVY}{i}" for i in range(10)] + ["both"]]
    await rounds(5)
    found = await ask("b", "both")
    assert compiler.tried[0].index("both") == 1
    assert (await asyncio.gather(*flood))[-1] is found
    assert compiler.tried[0].count("both") == 1
    assert compiler._bytes == sum(len(each.data) + 256 for each in compiler._kept.values())  # type: ignore[union-attr]


async def test_turns_that_are_left_are_nobodys():
    turns, had = Turns(), []

    async def take(user: str, name: str) -> None:
        await turns.acquire(user)
        try:
            had.append(name)
            await asyncio.sleep(0.001)
        finally:
            turns.release()

    tasks = {name: asyncio.create_task(take(name[0], name)) for name in ("a0", "a1", "b0", "a2", "b1", "c0")}
    await asyncio.sleep(0)
    tasks["b0"].cancel()
    tasks["c0"].cancel()
    await asyncio.gather(*tasks.values(), return_exceptions=True)
    assert had == ["a0", "b1", "a1", "a2"]
    await turns.acquire("a")
    given = asyncio.create_task(take("b", "never"))
    after = asyncio.create_task(take("c", "after"))
    await asyncio.sleep(0)
    turns.release()
    given.cancel()  # it was given the turn, and does not know it yet
    await asyncio.gather(given, after, return_exceptions=True)
    assert had[4:] == ["after"] and not turns._waiting and turns._holder is None
