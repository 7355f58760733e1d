"""The Response object: what was asked, what came of it, what it took."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal
from uuid import uuid4

from server.errors import ApiError
from server.generation import Choice, usage_of
from server.protocol.responses import ResponsesBody, ToolChoiceFunction

Status = Literal["in_progress", "completed", "incomplete", "failed"]


@dataclass
class ResponseObject:
    """Makes the object of one request in each of its states."""

    body: ResponsesBody
    id: str = field(default_factory=lambda: f"resp_{uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def started(self) -> dict[str, Any]:
        return self._object("in_progress", [])

    def ended(self, status: Status, output: Sequence[dict[str, Any]], choice: Choice) -> dict[str, Any]:
        """`status`: completed, or incomplete for an answer that ran into its limit."""
        result = self._object(status, output)
        result["usage"] = response_usage(choice)
        result["speculation"] = choice.speculated.body()
        if status == "completed":
            result["completed_at"] = int(time.time())
        else:
            result["incomplete_details"] = {"reason": "max_output_tokens"}
        if self.body.return_token_ids:
            result["prompt_token_ids"] = list(choice.prompt.ids)
            result["token_ids"] = choice.token_ids
        return result

    def failed(self, output: Sequence[dict[str, Any]], error: ApiError) -> dict[str, Any]:
        """`error.code` of a Response is one of OpenAI's; ours is in the `error` event before it."""
        result = self._object("failed", output)
        result["error"] = {"code": "server_error", "message": error.message}
        return result

    def _object(self, status: Status, output: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "completed_at": None,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "output": list(output),
            "usage": None,
            **_echo(self.body),
        }


def _echo(body: ResponsesBody) -> dict[str, Any]:
    """The request's own parameters, with what stood for those that it left out."""
    choice = body.tool_choice
    return {
        "model": body.model,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": body.max_tool_calls,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_logprobs": body.top_logprobs or 0,
        "presence_penalty": body.presence_penalty,
        "frequency_penalty": body.frequency_penalty,
        "text": {"format": body.text.format.model_dump(by_alias=True)},
        "tools": [tool.model_dump() for tool in body.tools],
        "tool_choice": choice.model_dump() if isinstance(choice, ToolChoiceFunction) else choice,
        "parallel_tool_calls": body.parallel_tool_calls,
        "reasoning": {"effort": body.reasoning.effort, "summary": None},
        "truncation": body.truncation,
        "metadata": body.metadata or {},
        "store": False,
        "background": False,
        "previous_response_id": None,
        "service_tier": "default",
        "user": body.user,
        "safety_identifier": body.safety_identifier,
        "prompt_cache_key": body.prompt_cache_key,
    }


def response_usage(choice: Choice) -> dict[str, Any]:
    """Chat's usage under this API's names, in tokens. Caching a prompt costs nothing: no writes count."""
    usage = usage_of([choice])
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": {**usage["prompt_tokens_details"], "cache_write_tokens": 0},
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {
            **usage["completion_tokens_details"],
            "reasoning_tokens": choice.reasoning_tokens,
        },
        "total_tokens": usage["total_tokens"],
    }
