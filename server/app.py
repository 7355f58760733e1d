"""The app: routes, the layers around them, and the engine's life."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import ModuleType
from typing import TYPE_CHECKING

import msgspec
from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import BaseRoute
from transformers import PreTrainedTokenizerBase

from engine.client import EngineClient
from engine.types import EngineUnavailable
from server import errors, openapi, tracing
from server.admission import Admission
from server.auth import OPEN_PATHS, KeyAuth
from server.bounds import LARGE_BODIES
from server.context import Context
from server.gate import Gate
from server.grammar import GrammarCompiler
from server.head import HeadAsGet
from server.key_limits import Limits
from server.keys import KeyRing
from server.log_lines import formatter
from server.logprobs import TokenTable, fast_tokenizer
from server.logs import RequestContext
from server.metrics import Metrics
from server.metrics_labels import constant_labels
from server.origins import OwnOrigin
from server.render import Renderer
from server.routes import chat, completions, docs, models, ops, page, responses, tokens
from server.settings import Settings

if TYPE_CHECKING:
    from server.spans import Tracing

log = logging.getLogger(__name__)


def create_app(settings: Settings, engine: EngineClient, tokenizer: PreTrainedTokenizerBase) -> FastAPI:
    """An app that owns `engine`: starts it in the background with the app, closes it at the end.

    Until it is ready, `/health`, `/ready` and requests answer 503; if it cannot load at all, the app
    stays up and says why. Raises ValueError for a tokenizer that is not a fast one, CannotTrace and BadKeys.
    """
    metrics = Metrics(
        constant_labels(settings.metrics_label),
        vllm_model=settings.served_model_name[0] if settings.metrics_compat == "vllm" else None,
    )
    context = Context(
        settings=settings,
        engine=engine,
        tokenizer=fast_tokenizer(tokenizer),
        table=TokenTable(tokenizer),
        renderer=Renderer(tokenizer, settings.tool_format),
        metrics=metrics,
        grammars=GrammarCompiler(
            tokenizer,
            seconds=settings.grammar_seconds,
            max_bytes=settings.max_grammar_bytes,
            vocab_size=lambda: engine.info.vocab_size,
            log_formatter=formatter(settings.log_format),
        ),
        door=_admission(settings, metrics),
    )
    engine.on_step(context.door.on_step)
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
        title="disco-serve",
        version=ops.product_version(),
        lifespan=lifespan,
        redirect_slashes=False,
        docs_url=None,  # FastAPI's pages load scripts from elsewhere
        redoc_url=None,
        openapi_url=None,
    )
    keys = KeyRing([key.get_secret_value() for key in settings.api_key], settings.api_key_file)
    app.state.keys = keys
    app.state.context = context
    routers = [each.router for each in (completions, chat, responses, tokens, models, ops)]
    for router in routers:
        app.include_router(router)
    if settings.page:
        app.include_router(page.router)
    if settings.docs:
        app.include_router(docs.router)
    context.metrics.limit.set(settings.max_num_seqs)
    context.metrics.expect(route.path for router in routers for route in router.routes)
    errors.install(app)
    openapi.install(app, model=settings.served_model_name[0], keys=keys.locked)
    _add_layers(app, context, keys, spans)
    return app


def _routes(*modules: ModuleType) -> list[BaseRoute]:
    return [route for module in modules for route in module.router.routes]


def _admission(settings: Settings, metrics: Metrics) -> Admission:
    return Admission(
        settings.max_num_seqs,
        requests=settings.max_queued_requests,
        tokens=settings.max_queued_tokens,
        body_bytes=LARGE_BODIES * settings.max_body_bytes,
        limits=Limits(
            settings.key_concurrency, settings.key_requests_per_minute, settings.key_tokens_per_minute
        ),
        metrics=metrics.admission,
        apart=settings.prefix_cache_by_key,
    )


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


def _add_layers(app: FastAPI, context: Context, keys: KeyRing, spans: Tracing | None) -> None:
    """Inner ones first: HEAD, gate, keys or origins, CORS (preflights carry no key), ids, errors, logs."""
    settings = context.settings
    app.add_middleware(HeadAsGet)
    app.add_middleware(
        Gate, door=context.door, generating=_routes(completions, chat, responses), others=_routes(tokens)
    )
    app.add_middleware(
        KeyAuth,
        keys=keys,
        open_paths=OPEN_PATHS | page.PATHS if settings.page else OPEN_PATHS,
    )
    if not keys.locked:  # a key is what a page of another site does not have
        app.add_middleware(OwnOrigin, allowed=settings.cors_origin)
    if settings.cors_origin:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origin,
            allow_methods=["GET", "HEAD", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after"],
        )
    decode = context.decode if settings.log_prompts else None
    app.add_middleware(RequestContext, metrics=context.metrics, tracing=spans, decode=decode)
