"""What answers say and what /metrics counts agree, to the token; the same over many requests of a real pair
is tests/suites/check_numbers.py."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import httpx
import pytest
from http_support import listening
from suites.accounts import ask_all, mix, whole
from suites.compared import idle, lines, since, total
from transformers import PreTrainedTokenizerFast

from engine.client_local import LocalEngine
from engine.config import EngineConfig
from server.app import create_app
from server.metrics_ledger import Ledger
from server.settings import Settings

LONG = 6000  # tokens; seconds that a client has to leave


@pytest.fixture(scope="module")
def bytes_alone(make_tokenizer: Callable[..., PreTrainedTokenizerFast]) -> PreTrainedTokenizerFast:
    """A token for each byte, and a chat template."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    return tokenizer


@pytest.fixture(scope="module")
def model(
    tmp_path_factory: pytest.TempPathFactory,
    bytes_alone: PreTrainedTokenizerFast,
    make_llama: Callable[..., Path],
) -> Path:
    """A random Llama with a long context, for it takes a while until a client has left."""
    return make_llama(tmp_path_factory.mktemp("long-llama"), bytes_alone, layers=3, context=8192)


@pytest.fixture
async def served(
    model: Path, bytes_alone: PreTrainedTokenizerFast
) -> AsyncIterator[tuple[httpx.AsyncClient, Ledger]]:
    """Of a server around that model, over sockets: a client can leave."""
    engine = LocalEngine(
        EngineConfig(target=str(model), draft="self:2", device="cpu", kv_blocks=600, max_num_seqs=12)
    )
    app = create_app(Settings(target="tiny"), engine, bytes_alone)
    async with listening(app) as port:
        limits = httpx.Limits(max_connections=None)
        base = f"http://127.0.0.1:{port}"
        async with httpx.AsyncClient(base_url=base, timeout=120, limits=limits) as client:
            await until_ready(client)
            yield client, app.state.context.metrics.ledger


async def until_ready(client: httpx.AsyncClient) -> None:
    async with asyncio.timeout(120):
        while (await client.get("/ready")).status_code != 200:
            await asyncio.sleep(0.05)


async def test_every_token_is_in_an_answer_or_discarded(
    served: tuple[httpx.AsyncClient, Ledger], bytes_alone: PreTrainedTokenizerFast
) -> None:
    client, ledger = served
    e = str(bytes_alone.convert_tokens_to_ids("e"))
    every = mix(60, "tiny", 8, LONG, bias={e: 12.0})
    quiet = whole(every)[:15]
    rest = [ask for ask in every if ask not in quiet]
    for asks, exact in ((quiet, True), (rest, False)):
        before = await idle(client)
        told = await ask_all(client, asks, at_once=16)
        counted = since(before, await idle(client))
        assert not told.faults and ledger.open == 0
        found = lines(asks, told, counted, exact)
        assert not [line for line in found if not line.agrees]
        if not exact:
            for reason in ("stop_string", "best_of", "aborted"):
                assert total(counted, "disco_discarded_tokens_total", reason) > 0, reason
            assert told.left > 0 and told.answers > 0
