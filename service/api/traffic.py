"""What happens around every request: its id, one log line, its metrics, and the last line of defence."""

import asyncio
import json
import logging
import re
import time
import uuid

from prometheus_client import Counter, Histogram
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.auth import AUTHENTICATE, Trust, trust
from service.api.problems import MEDIA_TYPE, problem

REQUESTS = Counter("secateurs_requests", "Answered requests", ["method", "route", "status"])
SECONDS = Histogram("secateurs_request_seconds", "Seconds until an answer was complete", ["method", "route"])
FREE_BODY = 1 << 14
"""Bytes that anybody may send: a stranger's megabyte took a second to parse, and all others waited for that."""
MAX_BODY = 1 << 20
"""Bytes of a request's body, counted as they arrive; routes that take tables and measurements allow more."""
MOST_DROPPED = 1 << 27
"""Bytes of a stranger's body that are taken in and dropped before it is refused."""
BODY_SECONDS, LEAST_RATE = 30.0, 16_384
"""A body may take so long, and a second more for every so many bytes of it."""
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
GIVEN_ID = re.compile(r"[A-Za-z0-9-]{1,64}")
log = logging.getLogger("secateurs.access")


class Traffic:
    """ASGI middleware; it also turns plain-text errors and unexpected exceptions into problem documents."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        exchange = _Exchange(scope, receive, send)
        try:
            await self.app(scope, exchange.receive, exchange.send)
        except Exception:
            log.exception("request %s failed", exchange.id)
            if exchange.status is not None:
                raise
            detail = f"an unexpected error; the log has it under request {exchange.id}"
            await problem(500, None, detail)(scope, receive, exchange.send)
        finally:
            exchange.record()


class _Exchange:
    """One request and what has been answered so far."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = Request(scope).headers.get("x-request-id", "")
        self.id = given if GIVEN_ID.fullmatch(given) else uuid.uuid4().hex
        self.status: int | None = None
        self._scope, self._receive, self._send = scope, receive, send
        self._replaced = self._whole = False
        self._trust: Trust | None = None
        self._got = 0
        self._began = time.perf_counter()

    async def receive(self) -> Message:
        """Pass a part of the request on: its body must keep coming, and a large one be from somebody who is known.

        A framework reads and parses a body before it asks who sends it.

        Raises:
            HTTPException: 408, 401 or 403.
        """
        if self._whole:
            return await self._receive()
        message = await self._part()
        needed = Trust((self._got > FREE_BODY) + (self._got > MAX_BODY))
        if self._trust is None and needed:
            self._trust = await run_in_threadpool(trust, Headers(scope=self._scope).get("authorization", ""))
        if self._trust is not None and self._trust < needed:
            while not self._whole and self._got < MOST_DROPPED:  # a client hears nothing before it has sent all
                await self._part()
            if self._trust is Trust.STRANGER:
                raise HTTPException(401, "a body of this size needs an API key or a device's token", AUTHENTICATE)
            raise HTTPException(403, "a body of this size needs an API key with scope 'submit', or a device's token")
        return message

    async def _part(self) -> Message:
        """The next part of the body, in time."""
        left = BODY_SECONDS + self._got / LEAST_RATE - (time.perf_counter() - self._began)
        try:
            message = await asyncio.wait_for(self._receive(), max(left, 0.0))
        except TimeoutError:
            raise HTTPException(408, "the body comes too slowly") from None
        self._whole, self._got = not message.get("more_body", False), self._got + len(message.get("body", b""))
        return message

    async def send(self, message: Message) -> None:
        """Pass a part of the answer on."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            replacement = _replacement(message)
            MutableHeaders(scope=message)["X-Request-ID"] = self.id
            if replacement is not None:
                self._replaced = True
                replacement.headers["X-Request-ID"] = self.id
                await replacement(self._scope, self._receive, self._send)
                return
        if not self._replaced:
            await self._send(message)

    def record(self) -> None:
        """One log line and the metrics."""
        seconds = time.perf_counter() - self._began
        method = self._scope["method"] if self._scope["method"] in METHODS else "other"
        route = _template(self._scope)
        REQUESTS.labels(method, route, str(self.status)).inc()
        SECONDS.labels(method, route).observe(seconds)
        facts = {
            "request": self.id, "method": method, "route": route, "path": self._scope["path"][:200],
            "status": self.status, "seconds": round(seconds, 4),
        }  # fmt: skip
        log.info("%s", json.dumps(facts))


def _template(scope: Scope) -> str:
    """The path of the route that answered; `scope["route"]` alone lacks the prefixes of the routers around it."""
    whole = scope.get("fastapi", {}).get("effective_route_context", scope.get("route"))
    return str(getattr(whole, "path", "unmatched"))


def _replacement(start: Message) -> Response | None:
    """The problem document for an error that a layer below has answered in plain text, e.g. 413 of the body limit."""
    content_type = Headers(raw=start["headers"]).get("content-type", "")
    if start["status"] < 400 or content_type.startswith(MEDIA_TYPE):
        return None
    detail = "the body is larger than this route takes" if start["status"] == 413 else "the request was refused"
    return problem(start["status"], None, detail)
