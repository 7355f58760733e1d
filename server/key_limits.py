"""What one API key may take: open requests, requests a minute, tokens a minute."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

from server.errors import ApiError, too_many

_MINUTE = 60.0


@dataclass(frozen=True)
class Limits:
    """Of each key; None: not limited. `requests` and `tokens` are a minute's."""

    concurrency: int | None = None
    requests: int | None = None
    tokens: int | None = None


class Bucket:
    """Fills evenly, a minute's worth at most. Tokens are known only once they are spent, so what is taken
    may leave less than nothing: then it has to fill up first."""

    def __init__(self, per_minute: int) -> None:
        self.per_minute = per_minute
        self._level, self._at = float(per_minute), time.monotonic()

    @property
    def level(self) -> float:
        """What may be taken now."""
        now = time.monotonic()
        grown = self._level + (now - self._at) * self.per_minute / _MINUTE
        self._level, self._at = min(float(self.per_minute), grown), now
        return self._level

    def take(self, count: int) -> None:
        """Takes so much, whether it is there or not."""
        self._level = self.level - count

    def seconds_to(self, level: float) -> float:
        """Until it holds so much; 0 if it does."""
        return max(0.0, (level - self.level) * _MINUTE / self.per_minute)


@dataclass
class Share:
    """What one key has taken. `name`: as operators know it; None: of everyone, where no key is needed."""

    name: str | None
    limits: Limits
    open: int = 0  # requests
    waiting: int = 0  # sequences in the queue
    waiting_tokens: int = 0  # of their prompts
    requests: Bucket | None = field(init=False)
    tokens: Bucket | None = field(init=False)

    def __post_init__(self) -> None:
        self.requests = None if self.limits.requests is None else Bucket(self.limits.requests)
        self.tokens = None if self.limits.tokens is None else Bucket(self.limits.tokens)

    def enter(self) -> None:
        """Another request. Raises ApiError 429, with the reason for the metrics as its `reason`."""
        most = self.limits.concurrency
        if most is not None and self.open >= most:
            message = f"{self.open} requests are open for {self._whom}; at most {most} may be"
            raise self._refused("key_concurrency", message, 1.0)
        if self.requests is not None and (wait := self.requests.seconds_to(1.0)) > 0:
            message = f"{self._whom} may send {self.requests.per_minute} requests a minute"
            raise self._refused("key_requests", message, wait)
        if self.tokens is not None and (wait := self.tokens.seconds_to(1.0)) > 0:
            message = f"{self._whom} may use {self.tokens.per_minute} tokens a minute, of prompts and answers"
            raise self._refused("key_tokens", message, wait)
        if self.requests is not None:
            self.requests.take(1)
        self.open += 1

    def leave(self) -> None:
        """One of its requests has ended."""
        self.open -= 1

    def spend(self, tokens: int) -> None:
        """So many tokens, of a prompt or generated."""
        if self.tokens is not None:
            self.tokens.take(tokens)

    def headers(self) -> dict[str, str]:
        """OpenAI's x-ratelimit-*, of what is limited."""
        told: dict[str, str] = {}
        for what, bucket in (("requests", self.requests), ("tokens", self.tokens)):
            if bucket is not None:
                told[f"x-ratelimit-limit-{what}"] = str(bucket.per_minute)
                told[f"x-ratelimit-remaining-{what}"] = str(max(0, math.floor(bucket.level)))
                told[f"x-ratelimit-reset-{what}"] = f"{bucket.seconds_to(bucket.per_minute):.3f}s"
        return told

    @property
    def _whom(self) -> str:
        return "all clients together" if self.name is None else f"the key '{self.name}'"

    def _refused(self, reason: str, message: str, seconds: float) -> ApiError:
        return too_many(message, reason, "rate_limit_exceeded", seconds, self.headers())
