"""The command `disco-serve top`: a running server, live in the terminal."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import typer

from server.flags import fail

if TYPE_CHECKING:
    import httpx
    from rich.console import Console, RenderableType


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
    import httpx
    from rich.console import Console

    root = url.rstrip("/").removesuffix("/v1")
    console = Console()
    try:
        with httpx.Client(timeout=max(2.0, interval), trust_env=False) as client:
            watched = Watched(client, root, metrics_url or f"{root}/metrics", window)
            if once:
                _once(watched, console, interval)
            elif console.is_terminal:
                _live(watched, console, interval)
            else:
                fail("top: stdout is no terminal; --once prints a single frame", code=2)
    except httpx.InvalidURL as error:
        fail(f"--url {url!r}: {error}", code=2)
    except KeyboardInterrupt:
        pass


class Unreachable(Exception):
    """Nobody answers, or not as a metrics page does."""


class Watched:
    """A server that is asked again and again; what it said lies in a window of pages."""

    def __init__(self, client: httpx.Client, url: str, metrics: str, window: float) -> None:
        from server.top_page import Window

        self._client, self._metrics = client, metrics
        self.url, self.window = url, Window(window)

    def look(self) -> str:
        """Asks for the metrics and the health; the latter in words. Raises Unreachable, NotOurs."""
        import httpx

        from server.top_page import Page

        try:
            answer = self._client.get(self._metrics)
            if answer.status_code != 200:
                raise Unreachable(f"{self._metrics} answers HTTP {answer.status_code}")
            self.window.add(Page(answer.text, time.monotonic()))
            health = self._client.get(f"{self.url}/health")
        except httpx.TransportError as error:
            raise Unreachable(f"unreachable: {error or type(error).__name__}") from error
        return _health(health)


def _health(answer: httpx.Response) -> str:
    try:
        found = answer.json()
        if answer.status_code == 200:
            return f"{found['engine']}, {found['restarts']} restarts"
        return str(found["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"/health answers HTTP {answer.status_code}"


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
