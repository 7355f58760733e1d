"""What the routes of one app share, and the questions that they all ask of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from fastapi import Request
from tokenizers import Tokenizer

from engine.client import EngineClient
from engine.types import CompiledGrammar, EngineUnavailable, GenerateRequest, ModelInfo
from engine.validate import token_set
from server import admission
from server.admission import Admission
from server.detokenize import TextStream
from server.errors import ApiError, unavailable
from server.grammar import GrammarCompiler, Structure
from server.limits import check_limits
from server.logprobs import TokenTable
from server.metrics import Metrics
from server.protocol.common import GenerationBody, Masks
from server.protocol.fields import word_tokens
from server.record import current
from server.render import Renderer
from server.settings import Settings
from server.turns import others_turn


@dataclass
class Context:
    """One app's parts. `loading_error`: why the engine could not load."""

    settings: Settings
    engine: EngineClient
    tokenizer: Tokenizer
    table: TokenTable
    renderer: Renderer
    metrics: Metrics
    grammars: GrammarCompiler
    door: Admission
    loading_error: Exception | None = None

    def check_model(self, name: str | None) -> None:
        """Raises ApiError 404 for a model that is not served here; None is the first name's."""
        names = self.settings.served_model_name
        current().name(names[0] if name is None else name)
        if name is not None and name not in names:
            message = f"the model '{name[:256]}' is not served here; served: {', '.join(names)}"
            raise ApiError(404, message, "model", "model_not_found")

    def accept(self, body: GenerationBody, arrival: float) -> None:
        """Holds `body` to this server's bounds, and starts the clock of its deadline. Raises InvalidRequest.

        `arrival`: when it came, by `time.monotonic`.
        """
        check_limits(body, self.settings)
        seconds = self.settings.max_request_seconds if body.timeout is None else body.timeout
        admission.current().due = None if seconds is None else arrival + seconds

    async def admit(self, requests: Sequence[GenerateRequest]) -> list[GenerateRequest]:
        """All sequences of one request, in the queue. Raises InvalidRequest if the engine would refuse any,
        ApiError 429 if they find no place."""
        for done, request in enumerate(requests, 1):
            await self.engine.check(request)
            await others_turn(done)
        return admission.current().enter(requests)

    def ready(self) -> ModelInfo:
        """The loaded model. Raises ApiError 503 while there is none that could serve."""
        if self.engine.state != "ready":
            raise unavailable(f"the engine is {self.engine.state}")
        return self.engine.info

    def known(self) -> ModelInfo | None:
        """The model as it was last loaded, also while the engine is down; None before."""
        try:
            return self.engine.info
        except EngineUnavailable:
            return None

    def decode(self, ids: Sequence[int]) -> str:
        """Token ids as text, special tokens included."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=False)

    async def grammar(self, body: GenerationBody) -> CompiledGrammar | None:
        """What the answer to `body` must match; None: anything. Raises InvalidRequest."""
        structure = body.structure()
        return None if structure is None else await self.compiled(structure)

    async def compiled(self, structure: Structure) -> CompiledGrammar:
        """The grammar of a part of the request that is being answered. Raises InvalidRequest."""
        return await self.grammars.compile(structure, admission.current().tenant)

    def masks(self, body: GenerationBody, grammar: CompiledGrammar | None) -> Masks:
        """What the answer to `body` may hold, besides `grammar`. Raises InvalidRequest."""
        bad_words = word_tokens(
            body.bad_words, lambda text: self.tokenizer.encode(text, add_special_tokens=False).ids
        )
        ids = body.allowed_token_ids
        allowed = None if ids is None else token_set(ids, "allowed_token_ids", self.engine.info.vocab_size)
        return Masks(grammar, allowed, bad_words)

    def text_stream(self, body: GenerationBody, continues: Sequence[int]) -> TextStream:
        """Reads the answer to `body` as text that continues the tokens `continues`."""
        return TextStream(
            self.tokenizer,
            skip_special_tokens=body.skip_special_tokens,
            stop=body.stop,
            include_stop=body.include_stop_str_in_output,
            min_tokens=body.min_tokens,
            prompt_ids=continues,
        )


def context_of(request: Request) -> Context:
    return cast(Context, request.app.state.context)
