"""What one request may ask for here: bounds that an operator sets, below those of the API."""

from __future__ import annotations

from engine.types import InvalidRequest
from server.protocol.common import GenerationBody
from server.settings import Settings


def check_limits(body: GenerationBody, settings: Settings) -> None:
    """Raises InvalidRequest, naming the field and its bound, for a body that asks for too much."""
    _at_most(body.n, settings.max_n, "n", "'n' is {}")
    sequences, field = body.sequences
    _at_most(sequences, settings.max_sequences, field, "prompts times choices are {}")
    _at_most(len(body.logit_bias), settings.max_logit_bias, "logit_bias", "'logit_bias' has {} entries")
    longest = max(map(len, body.stop), default=0)
    _at_most(longest, settings.max_stop_length, "stop", "'stop' has a string of {} characters")
    if (most := settings.max_request_seconds) is not None and (body.timeout or 0.0) > most:
        message = f"'timeout' is {body.timeout:g} seconds; at most {most:g} are allowed here"
        raise InvalidRequest(message, "timeout")


def _at_most(found: int, most: int, param: str, what: str) -> None:
    if found > most:
        raise InvalidRequest(f"{what.format(found)}; at most {most} are allowed here", param)
