"""From a chat request to its choices, ready to run: one way for chats and responses."""

from __future__ import annotations

from engine.types import CompiledGrammar, GenerateRequest, InvalidRequest
from server.context import Context
from server.detokenize import TextStream
from server.generation import Choice
from server.protocol.chat import ChatBody
from server.protocol.common import Masks
from server.reasoning import BEGIN, END
from server.render import Prompt, room_left
from server.structure import holds_calls, structure_of, tool_schemas
from server.tools import CallParser, ToolFormat
from server.turn import TurnReader


async def choices_of(context: Context, body: ChatBody, *, id: str, arrival: float) -> list[Choice]:
    """All `n` choices of a chat. Raises InvalidRequest if the template or the engine would refuse any,
    ApiError while there is no engine.

    `id`: of the answer. `arrival`: when the request came, by `time.monotonic`.
    """
    info = context.ready()
    prompt = await context.renderer.chat(body, info.max_model_len)
    calls = context.renderer.template.call_format() if body.callable() else None
    grammar = await _grammar(context, body, calls, prompt)
    max_tokens = room_left(prompt, info) if body.limit is None else body.limit
    masks = context.masks(body, grammar)
    requests = [_request(body, prompt, f"{id}-{i}", i, max_tokens, arrival, masks) for i in range(body.n)]
    try:
        requests = await context.admit(requests)
    except InvalidRequest as error:
        param = _own_names(body).get(error.param, error.param)
        raise InvalidRequest(error.message, param, error.code) from error
    hidden = _hidden(context, body, prompt, calls)
    return [_choice(context, body, request, prompt, calls, hidden, i) for i, request in enumerate(requests)]


def _own_names(body: ChatBody) -> dict[str | None, str]:
    """The request's names of fields that the engine calls otherwise."""
    limit = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    return {"prompt": "messages", "max_tokens": limit}


async def _grammar(
    context: Context, body: ChatBody, calls: ToolFormat | None, prompt: Prompt
) -> CompiledGrammar | None:
    structure = structure_of(body, calls, prompt.place)
    if structure is None:
        return None
    try:
        return await context.compiled(structure)
    except InvalidRequest:
        for schema in tool_schemas(body):  # says it in the request's own terms
            await context.compiled(schema)
        raise


def _request(
    body: ChatBody,
    prompt: Prompt,
    id: str,
    index: int,
    max_tokens: int,
    arrival: float,
    masks: Masks,
) -> GenerateRequest:
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    return GenerateRequest(
        id=id,
        prompt_ids=prompt.ids,
        params=body.sampling(choice=index, max_tokens=max_tokens, logprobs=logprobs, masks=masks),
        speculation=body.speculation.params(),
        priority=body.priority,
        arrival=arrival,
        cache_salt=body.cache_salt,
    )


def _choice(
    context: Context,
    body: ChatBody,
    request: GenerateRequest,
    prompt: Prompt,
    calls: ToolFormat | None,
    hidden: frozenset[int],
    index: int,
) -> Choice:
    # an answer begins a text of its own, unless it goes on with a message's
    continues = prompt.ids if body.continue_final_message else ()
    stream = TextStream(
        context.tokenizer,
        skip_special_tokens=False,
        stop=body.stop,
        include_stop=body.include_stop_str_in_output,
        min_tokens=body.min_tokens,
        prompt_ids=[token_id for token_id in continues if token_id not in hidden],
    )
    turn = TurnReader(_parser(body, calls), prompt.place)
    return Choice(index, request, prompt, stream, body.include_stop_str_in_output, turn, hidden)


def _hidden(context: Context, body: ChatBody, prompt: Prompt, calls: ToolFormat | None) -> frozenset[int]:
    """Special tokens that have no text. Markers of calls and of reasoning may be special, but are read."""
    if not body.skip_special_tokens:
        return frozenset()
    kept = (*(calls.markers if calls else ()), *((BEGIN, END) if prompt.place else ()))
    return context.renderer.template.special_ids(kept)


def _parser(body: ChatBody, calls: ToolFormat | None) -> CallParser | None:
    if calls is None:
        return None
    names = [tool.name for tool in body.callable()]
    begun = body.continue_final_message and bool(body.messages[-1].text.strip())
    return calls.parser(names, sure=holds_calls(body), only=body.forced, begun=begun)
