"""A tiny tokenizer with a chat template, an app around the scripted engine, and its clients."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator

import httpx
import pytest
from chat_support import Grammars
from fake_engine import FakeEngine
from fastapi import FastAPI
from http_support import listening, running
from live_app import Live, Script, live
from template_families import with_template
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from server.app import create_app
from server.settings import Settings

_CORPUS = ["hello world, the stop is here", "one two three four five", "hello there world"] * 4
_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' and 'forbidden' in m.content %}"
    "{{ raise_exception('no forbidden words') }}{% endif %}"
    "<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE, trained here: ids 0-2 are special, every byte has a token, a few words too."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=270,
        special_tokens=["<|end|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(_CORPUS, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>")
    tokenizer.chat_template = _TEMPLATE
    return tokenizer


@pytest.fixture
def ids(tokenizer: PreTrainedTokenizerFast) -> Callable[[str], list[int]]:
    return lambda text: list(tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.fixture
def engine(tokenizer: PreTrainedTokenizerFast, ids: Callable[[str], list[int]]) -> FakeEngine:
    engine = FakeEngine(len(tokenizer))
    engine.answer = [*ids(" world, the stop is here"), 0]
    return engine


@pytest.fixture
def settings() -> Settings:
    return Settings(target="tiny", api_key=[], max_body_bytes=20_000)


@pytest.fixture
def make_app(
    settings: Settings, engine: FakeEngine, tokenizer: PreTrainedTokenizerFast
) -> Callable[..., FastAPI]:
    return lambda **changes: create_app(settings.model_copy(update=changes), engine, tokenizer)


@pytest.fixture
def grammars() -> Grammars:
    return Grammars()


@pytest.fixture
def app_of(
    tokenizer: PreTrainedTokenizerFast, engine: FakeEngine, settings: Settings, grammars: Grammars
) -> Callable[[str], FastAPI]:
    """Apps of models with a chat template, with room for tools; grammars are noted, not compiled."""
    engine.make_room(4096)

    def app_of(template: str) -> FastAPI:
        app = create_app(settings, engine, with_template(tokenizer, template))
        app.state.context.grammars = grammars
        return app

    return app_of


@pytest.fixture
async def client(make_app: Callable[..., FastAPI]) -> AsyncIterator[httpx.AsyncClient]:
    async with running(make_app()) as client:
        yield client


@pytest.fixture
async def port(make_app: Callable[..., FastAPI]) -> AsyncIterator[int]:
    """The app behind uvicorn on a free port of 127.0.0.1."""
    async with listening(make_app()) as port:
        yield port


@pytest.fixture(scope="module")
def script(tokenizer: PreTrainedTokenizerFast) -> Script:
    """Says what a target and a draft say, for `app`."""
    return Script(len(tokenizer), eos=0)


@pytest.fixture(scope="module")
def app(script: Script, tokenizer: PreTrainedTokenizerFast) -> Iterator[Live]:
    """An app around a real engine whose models follow the script."""
    with live(script.engine(), tokenizer) as app:
        yield app
