"""`disco-serve generate`: one prompt on a terminal, drafted tokens marked, statistics at the end."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from engine.client_local import LocalEngine
from engine.models.load import ModelError
from engine.types import GenerateRequest, RequestFailed, SamplingParams, TokenEvent
from server.detokenize import TextStream
from server.prepare import prepare
from server.settings import Settings
from server.statistics import Speculated

_DRAFTED = "green"


@dataclass
class Tally:
    """What is told at the end. Times by `time.perf_counter`, in seconds."""

    started: float
    speculated: Speculated = field(default_factory=Speculated)
    tokens: int = 0
    first: float | None = None  # when the first token came
    last: float = 0.0
    finish_reason: str = "-"
    stops: Counter[str] = field(default_factory=Counter)  # why drafting stopped, how often

    def add(self, event: TokenEvent, now: float) -> None:
        """Counts one event that came at `now`."""
        if event.token_ids:
            self.first = now if self.first is None else self.first
            self.last = now
        self.tokens += len(event.token_ids)
        self.speculated.add(event, len(event.token_ids))
        if event.stop_reason is not None:
            self.stops[event.stop_reason] += 1
        self.finish_reason = event.finish_reason or self.finish_reason

    def rows(self) -> list[tuple[str, str]]:
        """Names and values. A ratio of nothing is "-"."""
        told = self.speculated
        waited = "-" if self.first is None else f"{self.first - self.started:.3f} s"
        after = self.last - (self.first or 0.0)
        return [
            ("tokens", f"{self.tokens} ({self.finish_reason})"),
            ("time to first token", waited),
            ("tokens per second after it", _ratio(told.emitted, after, ".1f")),
            ("drafter, policy", f"{told.drafter}, {told.policy}"),
            ("iterations (target passes)", str(told.iterations)),
            ("drafted, accepted", f"{told.drafted}, {told.accepted}"),
            ("acceptance rate", _ratio(told.accepted, told.drafted, ".3f")),
            ("mean SL", _ratio(told.lookahead, told.iterations, ".2f")),
            ("mean emitted per iteration", _ratio(told.emitted, told.iterations, ".2f")),
            ("drafting stopped by", ", ".join(f"{why} {n}" for why, n in sorted(self.stops.items())) or "-"),
            ("draft, verify", f"{told.draft_seconds:.3f} s, {told.verify_seconds:.3f} s"),
        ]


async def run(
    settings: Settings,
    prompt: str,
    *,
    max_tokens: int,
    temperature: float,
    seed: int | None,
    chat: bool | None,
    color: bool | None,
) -> None:
    """Loads the models, prints the text to stdout as it comes and the statistics to stderr.

    Raises ModelError, EngineUnavailable, InvalidRequest or RequestFailed.
    """
    config = settings.engine_config()
    errors = Console(stderr=True)
    tokenizer = prepare(config)
    params = SamplingParams(temperature=temperature, seed=seed, max_tokens=max_tokens)
    request = GenerateRequest(id="generate", prompt_ids=encode_prompt(tokenizer, prompt, chat), params=params)
    engine = LocalEngine(config)
    try:
        with errors.status(f"loading {config.target}"):
            await engine.start()
        tally = await show(engine.generate(request), request, tokenizer, terminal(color))
    finally:
        await engine.close()
    table = Table(show_header=False, box=None)
    for name, value in tally.rows():
        table.add_row(name, value)
    errors.print(table)


def terminal(color: bool | None) -> Console:
    """Where the text goes. `color` None: coloured if stdout is a terminal (and NO_COLOR is not set)."""
    forced = {None: {}, True: {"force_terminal": True, "color_system": "standard"}, False: {"no_color": True}}
    return Console(highlight=False, soft_wrap=True, **forced[color])  # type: ignore[arg-type]


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str, chat: bool | None) -> tuple[int, ...]:
    """Token ids of the prompt, through the chat template unless `chat` is False or there is none.

    Raises ModelError if `chat` is True and the model has no template.
    """
    if chat and tokenizer.chat_template is None:
        raise ModelError("--chat: the target's tokenizer has no chat template")
    if chat is False or tokenizer.chat_template is None:
        return tuple(tokenizer.encode(prompt))
    message = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    return tuple(tokenizer.encode(str(text), add_special_tokens=False))  # the template has them


async def show(
    events: AsyncIterator[TokenEvent],
    request: GenerateRequest,
    tokenizer: PreTrainedTokenizerBase,
    console: Console,
) -> Tally:
    """Prints tokens as they come. In an event of k, the first `accepted` were drafted.

    Raises RequestFailed if the engine gives the request up.
    """
    tally = Tally(started=time.perf_counter())
    stream = TextStream(tokenizer.backend_tokenizer, prompt_ids=request.prompt_ids)
    shown = 0
    async for event in events:
        tally.add(event, time.perf_counter())
        if event.finish_reason == "error":
            raise RequestFailed(event.error or "the engine gave up the request")
        for position, token in enumerate(event.token_ids):
            stream.push(
                token, silent=event.stop_token_id is not None and position == len(event.token_ids) - 1
            )
            style = _DRAFTED if position < event.accepted else ""
            console.print(Text(stream.text[shown:], style=style), end="")
            shown = len(stream.text)
    stream.finish()  # bytes of a character that never became whole
    console.print(Text(stream.text[shown:]))
    return tally


def _ratio(part: float, whole: float, form: str) -> str:
    return format(part / whole, form) if whole else "-"
