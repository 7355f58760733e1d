"""POST /tokenize and POST /detokenize."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request

from engine.types import InvalidRequest
from server.context import Context, context_of
from server.openapi import documented
from server.protocol import body as bodies
from server.protocol.answers import DetokenizeAnswer, TokenizeAnswer
from server.protocol.examples import DETOKENIZE, TOKENIZE
from server.protocol.tokens import DetokenizeBody, TokenizeBody
from server.render import Prompt

router = APIRouter(tags=["tokens"])


@router.post("/tokenize", **documented(TokenizeBody, TokenizeAnswer, examples=TOKENIZE))
async def tokenize(request: Request) -> dict[str, Any]:
    """The token ids of a text, or of a conversation through the chat template; generates nothing."""
    context = context_of(request)
    body = await bodies.read(request, TokenizeBody, context.settings)
    context.check_model(body.model)
    info = context.ready()
    prompt = await _prompt(context, body, info.max_model_len)
    names = [context.tokenizer.id_to_token(i) or "" for i in prompt.ids] if body.return_token_strs else None
    return {
        "count": len(prompt.ids),
        "max_model_len": info.max_model_len,
        "tokens": list(prompt.ids),
        "token_strs": names,
    }


async def _prompt(context: Context, body: TokenizeBody, length: int) -> Prompt:
    if body.prompt is not None:
        special = body.add_special_tokens is not False
        return (await context.renderer.prompts([body.prompt], length, special=special))[0]
    return await context.renderer.chat(body.chat(context.settings.served_model_name[0]), length)


@router.post("/detokenize", **documented(DetokenizeBody, DetokenizeAnswer, examples=DETOKENIZE))
async def detokenize(request: Request) -> dict[str, Any]:
    """The text of token ids, special tokens included."""
    context = context_of(request)
    body = await bodies.read(request, DetokenizeBody, context.settings)
    context.check_model(body.model)
    size = context.ready().vocab_size
    if (largest := max(body.tokens, default=0)) >= size:
        message = f"token id {largest} is out of range: the vocabulary ends at {size - 1}"
        raise InvalidRequest(message, "tokens", "token_id_out_of_range")
    text = await asyncio.to_thread(context.tokenizer.decode, body.tokens, skip_special_tokens=False)
    return {"prompt": text}
