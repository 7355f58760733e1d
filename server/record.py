"""What one HTTP request did: noted on its way, told once at its end, in the log and in its span."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from server.statistics import Speculated, total

if TYPE_CHECKING:
    from server.generation import Choice
    from server.render import Prompt

Outcome = Literal["done", "refused", "error", "abort"]
Decode = Callable[[Sequence[int]], str]

CLIENT_GONE = 499  # a status that nobody reads; it is what the log and the metrics say
_LONGEST = 256  # characters of what a client names


@dataclass(frozen=True)
class Phases:
    """How a request got on, by `time.monotonic`. Of several sequences, the first to get so far."""

    arrival: float
    scheduled: float  # a sequence first ran
    first: float  # a sequence had its first token
    last: float  # the last token so far

    def seconds(self) -> dict[str, float]:
        """How long each took; they follow each other."""
        return {
            "queue_seconds": self.scheduled - self.arrival,
            "prefill_seconds": self.first - self.scheduled,
            "decode_seconds": self.last - self.first,
        }


@dataclass
class Record:
    """One request. Times by `time.monotonic`, in seconds; what is not known is None.

    `error` and `error_status`: the code and status of the error that the client was told, in an answer or
    within a stream. `rendered`: its prompts, once they are tokens; `choices`: its sequences, once they run.
    """

    request_id: str = "-"
    method: str = "-"
    path: str = "-"
    key: str | None = None  # the name of the API key that it came with
    started: float = field(default_factory=time.monotonic)
    started_ns: int = field(default_factory=time.time_ns)  # the same moment, since 1970
    route: str = "unmatched"
    status: int = 0  # of the answer; 0: none was begun
    streamed: bool = False
    whole: bool = False  # the answer was given to its connection to the end
    seconds: float = 0.0
    operation: str | None = None  # what a traced request asks for, as OpenTelemetry names it
    model: str | None = None  # as the request names it
    error: str | None = None
    error_status: int = 0
    rendered: Sequence[Prompt] = ()
    choices: Sequence[Choice] = ()
    time_to_first_token: float | None = None
    trace_id: str | None = None
    span_id: str | None = None

    def begin(self, choices: Sequence[Choice]) -> None:
        """Its sequences start to run."""
        self.choices = choices

    def name(self, model: str) -> None:
        """It asks for this model."""
        self.model = model[:_LONGEST]

    def first_token(self) -> None:
        """A token has come; the first call counts."""
        if self.time_to_first_token is None:
            self.time_to_first_token = time.monotonic() - self.started

    def failed(self, status: int, code: str | None) -> None:
        """The client is told of an error; the first call counts."""
        if not self.error_status:
            self.error_status, self.error = int(status), code

    def answered(self, status: int, code: str | None) -> None:
        """Its client was told of this error in the app's place."""
        self.status = self.error_status = status
        self.error = code

    def end(self, route: str) -> None:
        """Nothing more happens. `route`: the template that its path matched, else "unmatched"."""
        self.route, self.seconds = route, time.monotonic() - self.started

    @property
    def id(self) -> str | None:
        """The answer's id, which those of its sequences are made of."""
        return self.choices[0].request.id.rpartition("-")[0] if self.choices else None

    @property
    def outcome(self) -> Outcome:
        """refused: a fault of the request, before any token; error: another one; abort: the client left."""
        worst = self.error_status or self.status
        if worst in (0, CLIENT_GONE):
            return "abort"
        if worst >= 400:
            return "error" if worst >= 500 or self.time_to_first_token is not None else "refused"
        return "done" if self.whole and all(choice.finish_reason for choice in self.choices) else "abort"

    @property
    def error_type(self) -> str | None:
        """The error's code, or its status if it has none; None if there was none, or nobody to read it."""
        if self.outcome not in ("refused", "error"):
            return None
        return self.error or str(self.error_status or self.status)

    @property
    def finish_reasons(self) -> list[str]:
        """Of every sequence; of one that did not end by itself, the outcome."""
        return [choice.finish_reason or self.outcome for choice in self.choices]

    @property
    def prompts(self) -> list[Choice]:
        """One sequence of each prompt."""
        return list({id(choice.prompt): choice for choice in reversed(self.choices)}.values())[::-1]

    @property
    def speculated(self) -> Speculated:
        return total(choice.speculated for choice in self.choices)

    @property
    def phases(self) -> Phases | None:
        """None before the first token, or if the engine does not tell."""
        begun = [choice.events[0] for choice in self.choices if choice.events]
        scheduled = [event.scheduled for event in begun if event.scheduled is not None]
        first = [event.at for event in begun if event.at is not None]
        last = [event.at for choice in self.choices for event in choice.events[-1:] if event.at is not None]
        if not (scheduled and first and last):
            return None
        arrival = self.choices[0].request.arrival
        return Phases(arrival, max(min(scheduled), arrival), min(first), max(last))

    def figures(self) -> dict[str, Any]:
        """Everything but prompt and text, by the names of the log. What is not known is left out."""
        told: dict[str, Any] = {
            "method": self.method,
            "path": self.path[:_LONGEST],
            "route": self.route,
            "status": self.status,
            "outcome": self.outcome,
            "error": self.error_type,
            "key": self.key,
            "seconds": self.seconds,
            "model": self.model,
            "trace_id": self.trace_id,
            "span_id": self.span_id,
        }
        if self.choices:
            told |= self._generation()
        return {name: value for name, value in told.items() if value is not None}

    def _generation(self) -> dict[str, Any]:
        spoken, phases = self.speculated.body(), self.phases
        del spoken["mean_emitted"]
        return {
            "id": self.id,
            "stream": self.streamed,
            "sequences": len(self.choices),
            "prompt_tokens": sum(len(choice.prompt.ids) for choice in self.prompts),
            "cached_tokens": sum(choice.cached_tokens for choice in self.prompts),
            "generated_tokens": sum(choice.shown_tokens for choice in self.choices),
            "finish_reasons": self.finish_reasons,
            "time_to_first_token": self.time_to_first_token,
            **({} if phases is None else phases.seconds()),
            **spoken,
        }

    def content(self, decode: Decode) -> dict[str, list[str]]:
        """The prompts as the model reads them, and the text of every sequence as far as it came."""
        return {
            "prompts": [prompt_text(prompt, decode) for prompt in self.rendered],
            "texts": [choice.text for choice in self.choices],
        }


def prompt_text(prompt: Prompt, decode: Decode) -> str:
    """A prompt as text; that of a chat is what its template made."""
    return decode(prompt.ids) if prompt.text is None else prompt.text


_current: ContextVar[Record | None] = ContextVar("record", default=None)
enter, leave = _current.set, _current.reset


def current() -> Record:
    """The record of the request that is being answered here; outside of one, a record that nobody reads."""
    return _current.get() or Record()
