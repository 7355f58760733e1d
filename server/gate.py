"""The gate before the routes: who is let in holds a ticket while it is answered."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.datastructures import MutableHeaders
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server import admission
from server.admission import Admission
from server.auth import KEY_NAME, OPEN_PATHS
from server.errors import ApiError, to_api_error


class Gate:
    """ASGI middleware behind the keys: 429 and 503 are answered before the body is read.

    `generating`: routes that ask the engine; `others`: those that read a body, too. What is neither is
    refused only once the server ends, and what an orchestrator asks not even then.
    """

    def __init__(
        self, app: ASGIApp, door: Admission, generating: Sequence[BaseRoute], others: Sequence[BaseRoute]
    ) -> None:
        self._app, self._door = app, door
        self._generating, self._reading = generating, (*generating, *others)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        # By the router's own rule: what it lets through under another spelling is gated all the same.
        route = next((each for each in self._reading if each.matches(scope)[0] is Match.FULL), None)
        if (route is None and not self._door.draining) or scope["path"] in OPEN_PATHS:
            return await self._app(scope, receive, send)
        try:
            ticket = self._door.open(scope.get(KEY_NAME), generates=route in self._generating)
        except ApiError as error:
            if route is not None:
                scope["route"] = route  # for the metrics: no router sees this request
            return await to_api_error(error).response()(scope, receive, send)
        share, token = ticket.share, admission.enter(ticket)

        async def send_with_limits(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in share.headers().items():
                    headers[name] = value
            await send(message)

        try:
            await self._app(scope, receive, send_with_limits)
        finally:
            self._door.close(ticket)
            admission.leave(token)
