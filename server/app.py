"""The app: routes, the layers around them, and the engine's life."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import msgspec
from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from transformers import PreTrainedTokenizerBase

from engine.client import EngineClient
from engine.types import EngineUnavailable
from server import errors, openapi, tracing
from server.auth import OPEN_PATHS, KeyAuth
from server.context import Context
from server.grammar import GrammarCompiler
from server.head import HeadAsGet
from server.logprobs import TokenTable, fast_tokenizer
from server.logs import RequestContext
from server.metrics import Metrics
from server.metrics_labels import constant_labels
from server.render import Renderer
from server.routes import chat, completions, models, ops, page, responses, tokens
from server.settings import Settings

if TYPE_CHECKING:
    from server.spans import Tracing

log = logging.getLogger(__name__)


def create_app(settings: Settings, engine: EngineClient, tokenizer: PreTrainedTokenizerBase) -> FastAPI:
    """An app that owns `engine`: starts it in the background with the app, closes it at the end.

    Until it is ready, `/health`, `/ready` and requests answer 503; if it cannot load at all, the app
    stays up and says why. Raises ValueError for a tokenizer that is not a fast one, and CannotTrace.
    """
    context = Context(
        settings=settings,
        engine=engine,
        tokenizer=fast_tokenizer(tokenizer),
        table=TokenTable(tokenizer),
        renderer=Renderer(tokenizer, settings.tool_format),
        metrics=Metrics(
            constant_labels(settings.metrics_label),
            vllm_model=settings.served_model_name[0] if settings.metrics_compat == "vllm" else None,
        ),
        grammars=GrammarCompiler(
            tokenizer,
            seconds=settings.grammar_seconds,
            max_bytes=settings.max_grammar_bytes,
            vocab_size=lambda: engine.info.vocab_size,
        ),
    )
    context.metrics.watch(engine, ops.product_version())
    spans = tracing.connect(settings, context.decode)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        loading = asyncio.create_task(_load(context))
        try:
            yield
        finally:
            loading.cancel()
            await asyncio.gather(loading, return_exceptions=True)
            try:
                await engine.close()
            finally:
                context.renderer.close()
                context.grammars.close()
                if spans is not None:
                    await spans.close()

    app = FastAPI(
        title="disco-serve", version=ops.product_version(), lifespan=lifespan, redirect_slashes=False
    )
    app.state.context = context
    routers = [each.router for each in (completions, chat, responses, tokens, models, ops)]
    for router in routers:
        app.include_router(router)
    if settings.page:
        app.include_router(page.router)
    context.metrics.limit.set(settings.max_num_seqs)
    context.metrics.expect(route.path for router in routers for route in router.routes)
    errors.install(app)
    openapi.install(app, model=settings.served_model_name[0], keys=bool(settings.api_key))
    _add_layers(app, context, spans)
    return app


async def _load(context: Context) -> None:
    try:
        await context.engine.start()
    except EngineUnavailable as error:  # the engine's client has logged it
        context.loading_error = error
    except Exception as error:  # nobody awaits this task: what happened shows in the log and in /health
        log.exception("the engine cannot load")
        context.loading_error = error
    else:
        info = context.engine.info
        log.info("the engine is ready: %s", msgspec.structs.replace(info, heads={}, refusals={}))


def _add_layers(app: FastAPI, context: Context, spans: Tracing | None) -> None:
    """Inner ones first: HEAD, keys, then CORS (preflights carry no key), then ids, errors and logs."""
    settings = context.settings
    app.add_middleware(HeadAsGet)
    app.add_middleware(
        KeyAuth,
        keys=[key.get_secret_value() for key in settings.api_key],
        open_paths=OPEN_PATHS | page.PATHS if settings.page else OPEN_PATHS,
    )
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "HEAD", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after"],
        )
    decode = context.decode if settings.log_prompts else None
    app.add_middleware(RequestContext, metrics=context.metrics, tracing=spans, decode=decode)
