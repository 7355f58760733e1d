"""`disco-serve bench` and `top` against the default pair, in miniature."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from http_support import listening
from typer.testing import CliRunner, Result

from engine.client_local import LocalEngine
from engine.models.load import load_tokenizer
from server import cli
from server.app import create_app
from server.settings import Settings
from server.top_frame import frame
from server.top_page import Page, Window


@pytest.fixture
async def url(smollm2: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[str]:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    settings = Settings(
        target=str(smollm2),
        served_model_name=["pair"],
        threads=1,
        kv_blocks=64,
        max_num_seqs=4,
        max_model_len=256,
    )
    engine = LocalEngine(settings.engine_config())
    app = create_app(settings, engine, load_tokenizer(str(smollm2)))
    async with listening(app) as port:
        while engine.state == "loading":
            await asyncio.sleep(0.05)
        assert engine.state == "ready", app.state.context.loading_error
        yield f"http://127.0.0.1:{port}"


async def run(*arguments: str) -> Result:
    return await asyncio.to_thread(CliRunner().invoke, cli.app, list(arguments))


async def test_bench_and_top_tell_what_the_server_counts(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "bench.json"
    before = Page(await metrics(url), 0.0)
    measured = await run(
        "bench", "--url", f"{url}/v1", "--concurrency", "1,2", "--requests", "2", "--input-tokens", "8",
        "--max-tokens", "6", "--ignore-eos", "--per-token-itl", "--policy", "static", "--json", str(out),
    )  # fmt: skip
    assert measured.exit_code == 0, measured.output
    found = json.loads(out.read_text())
    assert (found["server"]["kind"], found["server"]["model"]) == ("disco-serve", "pair")
    assert any("of 8 tokens (by the server's /tokenize)" in note for note in found["notes"])
    for level in found["levels"]:
        assert (level["good"], level["failed"], level["output_tokens"], level["input_tokens"]) == (
            2,
            0,
            12,
            16,
        )
        assert (level["counted_by"], level["itl_of"]) == ("usage", "tokens")
        assert level["speculation"]["policies"] == ["static"]
        assert level["ttft_ms"]["p50"] <= level["e2e_ms"]["p50"]
    told = Window(1e9)
    told.add(before)
    told.add(Page(text := await metrics(url), 1.0))
    requests = (1 + 2) + (2 + 2)
    assert told.total("generated_tokens_total") == 6 * requests + 1  # the probe asks for one
    assert told.grown("requests_total", "outcome")[("length",)] == requests + 1
    everything_is_there(told, text, monkeypatch)

    shown = await run("top", "--url", url, "--once", "--interval", "0.1")
    assert shown.exit_code == 0, shown.output
    assert "ready, 0 restarts" in shown.stdout and "(0 of 64 blocks)" in shown.stdout


async def metrics(url: str) -> str:
    async with httpx.AsyncClient() as client:
        return (await client.get(f"{url}/metrics")).text


def everything_is_there(window: Window, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A frame reads no metric that the server does not have."""
    asked: set[str] = set()
    for name in ("samples", "since"):
        own = getattr(Page, name)

        def noting(self: Page, *given: Any, own: Any = own) -> Any:
            asked.add(given[-1])
            return own(self, *given)

        monkeypatch.setattr(Page, name, noting)
    frame(window, "ready", "")
    monkeypatch.undo()
    assert len(asked) > 20
    names = {name.removesuffix("_bucket").removesuffix("_sum") for name in asked}
    assert [name for name in sorted(names) if f"# TYPE disco_{name} " not in text] == []
