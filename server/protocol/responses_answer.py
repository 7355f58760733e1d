"""What POST /v1/responses answers, for the OpenAPI page; tests hold the answers to it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, RootModel

from server.protocol.answers import Answer, PromptLogprob, Speculated

ItemStatus = Literal["in_progress", "completed", "incomplete"]


class TokenLogprob(Answer):
    """A token and its log-probability, the target's own, in nats."""

    token: str
    logprob: float = Field(le=0)
    bytes: list[int]


class ChosenLogprob(TokenLogprob):
    """A token of the answer, and others at its place."""

    top_logprobs: list[TokenLogprob]


class OutputText(Answer):
    """The text of a message."""

    type: Literal["output_text"]
    text: str
    logprobs: list[ChosenLogprob] = Field(description="none unless they are included")
    annotations: list[Any] = Field(max_length=0)


class ReasoningText(Answer):
    """What the model thought, whole."""

    type: Literal["reasoning_text"]
    text: str


class OutputMessage(Answer):
    """What the model says."""

    id: str
    type: Literal["message"]
    status: ItemStatus
    role: Literal["assistant"]
    content: list[OutputText] = Field(max_length=1)


class OutputReasoning(Answer):
    """What the model thinks before it says something; there are no summaries."""

    id: str
    type: Literal["reasoning"]
    status: ItemStatus
    summary: list[Any] = Field(max_length=0)
    content: list[ReasoningText] = Field(max_length=1)


class OutputFunctionCall(Answer):
    """A call for the client to make; its result goes back in as a function_call_output."""

    id: str
    type: Literal["function_call"]
    status: ItemStatus
    call_id: str
    name: str
    arguments: str = Field(description="JSON, as a string")


OutputItem = Annotated[OutputMessage | OutputReasoning | OutputFunctionCall, Field(discriminator="type")]
Part = Annotated[OutputText | ReasoningText, Field(discriminator="type")]


class InputDetails(Answer):
    cached_tokens: int = Field(ge=0, description="tokens of the prompt whose KV was there already")
    cache_write_tokens: Literal[0] = Field(description="OpenAI's charge for caching; there is none")


class OutputDetails(Answer):
    reasoning_tokens: int = Field(ge=0)
    accepted_prediction_tokens: int = Field(ge=0, description="draft tokens that are part of the answer")
    rejected_prediction_tokens: int = Field(ge=0, description="draft tokens that are not")


class ResponsesUsage(Answer):
    """Tokens of a request."""

    input_tokens: int = Field(ge=0)
    input_tokens_details: InputDetails
    output_tokens: int = Field(ge=0)
    output_tokens_details: OutputDetails
    total_tokens: int = Field(ge=0)


class IncompleteDetails(Answer):
    reason: Literal["max_output_tokens"]


class ResponseFault(Answer):
    code: Literal["server_error"]
    message: str


class ResponsesAnswer(Answer):
    """A response: what came of the request, and its parameters as they stood."""

    id: str
    object: Literal["response"]
    created_at: int = Field(description="seconds since 1970")
    completed_at: int | None = Field(description="null unless the status is completed")
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    error: ResponseFault | None = Field(description="with the status failed")
    incomplete_details: IncompleteDetails | None
    output: list[OutputItem]
    usage: ResponsesUsage | None = Field(description="null until the answer is whole")
    model: str
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: int | None
    temperature: float
    top_p: float
    top_logprobs: int
    presence_penalty: float
    frequency_penalty: float
    text: dict[str, Any]
    tools: list[dict[str, Any]]
    tool_choice: str | dict[str, Any]
    parallel_tool_calls: bool
    reasoning: dict[str, Any]
    truncation: Literal["disabled"]
    metadata: dict[str, str]
    store: Literal[False]
    background: Literal[False]
    previous_response_id: None
    service_tier: Literal["default"]
    user: str | None
    safety_identifier: str | None
    prompt_cache_key: str | None
    speculation: Speculated | None = Field(None, description="ours; with the status completed or incomplete")
    prompt_token_ids: list[int] | None = Field(None, description="with `return_token_ids`")
    token_ids: list[int] | None = Field(None, description="with `return_token_ids`")
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | None = Field(
        None, description="with `prompt_logprobs`: by token id; null for the first token"
    )


class _Event(Answer):
    sequence_number: int = Field(ge=0, description="0, 1, 2, ...")


class StateEvent(_Event):
    """The response as it stands: at the beginning, and as the last event."""

    type: Literal[
        "response.created",
        "response.in_progress",
        "response.completed",
        "response.incomplete",
        "response.failed",
    ]
    response: ResponsesAnswer


class ItemEvent(_Event):
    """An output item begins, or is whole."""

    type: Literal["response.output_item.added", "response.output_item.done"]
    output_index: int = Field(ge=0)
    item: OutputItem


class _InItem(_Event):
    item_id: str
    output_index: int = Field(ge=0)


class PartEvent(_InItem):
    """A part of an item begins, or is whole."""

    type: Literal["response.content_part.added", "response.content_part.done"]
    content_index: Literal[0]
    part: Part


class TextDeltaEvent(_InItem):
    """More text of a message."""

    type: Literal["response.output_text.delta"]
    content_index: Literal[0]
    delta: str
    logprobs: list[ChosenLogprob]


class TextDoneEvent(_InItem):
    """The whole text of a message."""

    type: Literal["response.output_text.done"]
    content_index: Literal[0]
    text: str
    logprobs: list[ChosenLogprob]


class ReasoningDeltaEvent(_InItem):
    """More of what the model thinks."""

    type: Literal["response.reasoning_text.delta"]
    content_index: Literal[0]
    delta: str


class ReasoningDoneEvent(_InItem):
    """All of what the model thought."""

    type: Literal["response.reasoning_text.done"]
    content_index: Literal[0]
    text: str


class ArgumentsDeltaEvent(_InItem):
    """More of a call's arguments."""

    type: Literal["response.function_call_arguments.delta"]
    delta: str


class ArgumentsDoneEvent(_InItem):
    """A call's whole arguments."""

    type: Literal["response.function_call_arguments.done"]
    name: str
    arguments: str


class ErrorEvent(_Event):
    """What went wrong midway; response.failed follows."""

    type: Literal["error"]
    code: str | None
    message: str
    param: str | None


class ResponsesEvent(
    RootModel[
        Annotated[
            StateEvent
            | ItemEvent
            | PartEvent
            | TextDeltaEvent
            | TextDoneEvent
            | ReasoningDeltaEvent
            | ReasoningDoneEvent
            | ArgumentsDeltaEvent
            | ArgumentsDoneEvent
            | ErrorEvent,
            Field(discriminator="type"),
        ]
    ]
):
    """The data of one event of a streamed response; the event's name is its `type`. There is no [DONE]."""
