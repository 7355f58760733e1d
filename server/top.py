"""The command `disco-serve top`: a running server, live in the terminal."""

from __future__ import annotations

import asyncio
import json
import time
from typing import TYPE_CHECKING, Annotated

import typer

from server.flags import fail

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

_PATIENCE = 10.0  # seconds for one look at the server, at least
_LARGEST = 1 << 22  # bytes of an answer
_SHOWN = 300  # characters of what is said


def top(
    url: Annotated[str, typer.Option(help="Base URL of a disco-serve, with or without /v1.")] = (
        "http://127.0.0.1:8000"
    ),
    metrics_url: Annotated[
        str | None, typer.Option(help="Where its metrics are. Default: /metrics of the base URL.")
    ] = None,
    interval: Annotated[float, typer.Option(min=0.1, max=60.0, help="Seconds between two frames.")] = 2.0,
    window: Annotated[
        float, typer.Option(min=0.1, help="Seconds that rates, ratios and quantiles look back.")
    ] = 30.0,
    once: Annotated[
        bool, typer.Option("--once", help="One frame, of what happens within one interval; for scripts.")
    ] = False,
) -> None:
    """Show what a running disco-serve does: requests, latencies, KV, speculation by policy.

    Ctrl-C ends it.
    """
    from rich.console import Console

    from server.bench.told import without_userinfo

    root = url.rstrip("/").removesuffix("/v1")
    console = Console()
    try:
        with Watched(root, metrics_url or f"{root}/metrics", window, interval) as watched:
            if once:
                _once(watched, console, interval)
            elif console.is_terminal:
                _live(watched, console, interval)
            else:
                fail("top: stdout is no terminal; --once prints a single frame", code=2)
    except BadURL:
        fail(f"--url {without_userinfo(url)!r} or --metrics-url is not a URL", code=2)
    except KeyboardInterrupt:
        pass


class Unreachable(Exception):
    """Nobody answers, or not as a metrics page does."""

    def __init__(self, message: str) -> None:
        from server.log_lines import one_line

        super().__init__(one_line(message[:_SHOWN]))


class BadURL(Exception):
    """A URL that nobody can be asked at."""


class Watched:
    """A server that is asked again and again; what it said lies in a window of pages. Close it by `with`."""

    def __init__(self, url: str, metrics: str, window: float, interval: float) -> None:
        import httpx

        from server.bench.told import without_userinfo
        from server.top_page import Window

        self._asked, self._metrics, self._patience = url, metrics, max(_PATIENCE, 2 * interval)
        self.url, self.window = without_userinfo(url), Window(window)
        self._runner = asyncio.Runner()
        self._client = httpx.AsyncClient(timeout=max(2.0, interval), trust_env=False)

    def __enter__(self) -> Watched:
        return self

    def __exit__(self, *_: object) -> None:
        with self._runner:
            self._runner.run(self._client.aclose())

    def look(self) -> str:
        """Asks for the metrics and the health; the latter in words. Raises Unreachable, NotOurs, BadURL."""
        return self._runner.run(self._look())

    async def _look(self) -> str:
        import httpx

        from server.bench.told import without_userinfo
        from server.top_page import Page

        try:
            async with asyncio.timeout(self._patience):  # httpx's is of each byte
                status, text = await self._get(self._metrics)
                if status != 200:
                    raise Unreachable(f"{without_userinfo(self._metrics)} answers HTTP {status}")
                self.window.add(Page(text, time.monotonic()))
                return _health(*await self._get(f"{self._asked}/health"))
        except TimeoutError as error:
            raise Unreachable(f"no whole answer within {self._patience:g} s") from error
        except httpx.DecodingError as error:
            raise Unreachable(f"the answer cannot be read: {error or type(error).__name__}") from error
        except httpx.HTTPError as error:
            raise Unreachable(f"unreachable: {error or type(error).__name__}") from error
        except (httpx.InvalidURL, UnicodeError) as error:
            raise BadURL from error

    async def _get(self, url: str) -> tuple[int, str]:
        """Status and text."""
        found = bytearray()
        async with self._client.stream("GET", url) as answer:
            async for piece in answer.aiter_bytes():
                found += piece
                if len(found) > _LARGEST:
                    raise Unreachable(f"the answer cannot be read: it has over {_LARGEST} bytes")
            return answer.status_code, found.decode(errors="replace")


def _health(status: int, text: str) -> str:
    from server.log_lines import one_line

    try:
        found = json.loads(text)
        if status == 200:
            said = f"{found['engine']}, {found['restarts']} restarts"
        else:
            said = str(found["error"]["message"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return f"/health answers HTTP {status}"
    return one_line(said[:_SHOWN])


def _once(watched: Watched, console: Console, interval: float) -> None:
    from rich.console import Console

    from server.top_frame import frame
    from server.top_page import NotOurs

    try:
        watched.look()
        time.sleep(interval)
        state = watched.look()
    except (Unreachable, NotOurs) as error:
        fail(f"{watched.url}: {error}")
    wide = console if console.is_terminal else Console(width=160)
    wide.print(frame(watched.window, state, watched.url))


def _live(watched: Watched, console: Console, interval: float) -> None:
    from rich.live import Live

    with Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            live.update(_frame(watched, interval), refresh=True)
            time.sleep(interval)


def _frame(watched: Watched, interval: float) -> RenderableType:
    """What there is to show now: the server, or why there is none."""
    from server.top_frame import frame, unreachable
    from server.top_page import NotOurs

    try:
        return frame(watched.window, watched.look(), watched.url)
    except (Unreachable, NotOurs) as error:
        return unreachable(watched.url, str(error), interval)
