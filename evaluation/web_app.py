"""The small web page as an ASGI application: what it serves, and what it refuses.

There is no address of a file: every path is one of a fixed list, and photos of the data set are named by an
answer that this server gave and kept.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import secrets
import socket
import sys
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from http import HTTPStatus
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from uvicorn.protocols.http.h11_impl import H11Protocol

from evaluation.answer_photos import to_document
from evaluation.answer_queue import AnswerQueue, Located
from evaluation.known_photos import KnownPhotos
from evaluation.pages import map_cells, map_corner, read_page
from evaluation.places import east_north
from evaluation.result_files import without_nan
from evaluation.uploads import FORMATS, Refused, base_name, read_body
from shards.console import JobError

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

_UPLOAD_SECONDS = 60.0
_HEAD_SECONDS = 20.0
_ANSWERS_KEPT = 512
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' blob: data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class WebApp:
    """Answers uploads out of a queue, and shows them on a page."""

    def __init__(self, queue: AnswerQueue, known: KnownPhotos | None, *, private: bool) -> None:
        self.queue = queue
        self.known = known
        self.answers: OrderedDict[str, Located] = OrderedDict()
        page = read_page("serve")
        classes = queue.localiser.classes
        corner = map_corner(classes)
        self.about = {
            "cells": map_cells(classes, corner),
            "corner": corner,
            "zone": classes.zone,
            "apart": queue.request.apart,
            "max_bytes": queue.limits.bytes,
            "max_pixels": queue.limits.pixels,
            "formats": FORMATS,
            "private": private,
        }
        self.routes = [
            _fixed("/", page.html, "text/html"),
            _fixed("/page.css", page.css, "text/css"),
            _fixed("/page.js", page.js, "text/javascript"),
            _fixed("/about", json.dumps(self.about, separators=(",", ":")), "application/json"),
            Route("/locate", self.locate, methods=["POST"]),
            Route("/known/{answer}/{rank:int}", self.known_photos),
        ]

    async def locate(self, request: Request) -> Response:
        """The places of the photo in the request's body, as `predict.py --json` gives them.

        Beside them `known_east_north`, the known position in the class map's plane (UTM metres), and `answer`, the key
        to the known photos of its places where there is a data set.
        """
        declared, name = request.headers.get("content-length"), base_name(request.query_params.get("name", ""))
        with self.queue.place():
            try:
                async with asyncio.timeout(_UPLOAD_SECONDS):
                    content = await read_body(request.stream(), declared, self.queue.limits)
            except TimeoutError:
                raise Refused(HTTPStatus.REQUEST_TIMEOUT, "The photo did not arrive within a minute.") from None
            loop = asyncio.get_running_loop()
            upload = await loop.run_in_executor(self.queue.decoders, self.queue.decode, content, name)
            del content
            located = await asyncio.wrap_future(self.queue.answer(upload))
        document = to_document([located.photo], [], self.queue.localiser)
        document["checkpoint"] = self.queue.localiser.path.name  # a path of the server is nobody's business
        known = located.photo.known
        classes = self.queue.localiser.classes
        document["known_east_north"] = known and east_north(known, classes.zone, southern=classes.southern)
        if self.known is not None:
            document["answer"] = self._keep(located)
        return JSONResponse(without_nan(document))

    async def known_photos(self, request: Request) -> Response:
        """The training photos most like an answered photo in the cell of one of its places (0: the best)."""
        located = self.answers.get(request.path_params["answer"])
        rank = request.path_params["rank"]
        if self.known is None or located is None or rank >= len(located.photo.places):
            raise Refused(HTTPStatus.NOT_FOUND, "This answer is no longer kept; ask again with the photo.")
        place, side = located.photo.places[rank], self.queue.localiser.shorter_side
        loop = asyncio.get_running_loop()
        with self.queue.place():
            try:
                photos = await loop.run_in_executor(
                    self.queue.decoders, self.known.nearest, place, located.vector, side, self.queue.describe
                )
            except (JobError, OSError) as error:
                print(f"error: {self.known.samples.dataset.path}: {error}", file=sys.stderr)
                raise Refused(HTTPStatus.INTERNAL_SERVER_ERROR, "The photos of this cell cannot be read.") from error
        return JSONResponse(without_nan({"photos": photos}))

    def _keep(self, located: Located) -> str:
        answer = secrets.token_urlsafe(12)
        self.answers[answer] = located
        if len(self.answers) > _ANSWERS_KEPT:
            self.answers.popitem(last=False)
        return answer


class PageServer(uvicorn.Server):
    """A server of the page that calls `ready` once it answers (Ctrl-C then ends it in order).

    `names` are host names by which it may be asked, besides addresses and localhost.
    """

    def __init__(self, page: WebApp, names: Iterable[str], ready: Callable[[], None]) -> None:
        starlette = Starlette(
            routes=page.routes,
            exception_handlers=dict.fromkeys((Refused, HTTPException, ClientDisconnect, Exception), _refuse),
        )
        config = uvicorn.Config(
            Guard(starlette, names),
            http=HastyProtocol,
            ws="none",
            loop="asyncio",
            lifespan="off",
            proxy_headers=False,
            server_header=False,
            log_level="error",
            timeout_graceful_shutdown=2,
        )
        super().__init__(config)
        self.ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say so."""
        await super().startup(sockets)
        self.ready()


class HastyProtocol(H11Protocol):
    """Uvicorn's HTTP/1.1, but a connection that brings no request to answer within `_HEAD_SECONDS` is closed.

    Uvicorn waits as long as bytes come, for headers and for the rest of a body that was answered already, so that
    slow clients could take all connections.
    """

    deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for the first request."""
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Read on; after an answer uvicorn's own limit holds until the next request begins."""
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting."""
        super().connection_lost(exc)
        self._stop()

    def _watch(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop()
        elif self.deadline is None and not self.transport.is_closing():
            self.deadline = self.loop.call_later(_HEAD_SECONDS, self.transport.close)

    def _stop(self) -> None:
        if self.deadline is not None:
            self.deadline.cancel()
            self.deadline = None


class Guard:
    """Lets only requests through that name this server and come from its own page or from no page; adds headers.

    A name that is no address may be made to point here by whoever owns it (DNS rebinding), so it must be known.
    """

    def __init__(self, app: Starlette, names: Iterable[str]) -> None:
        self.app = app
        self.names = {"localhost", *(name.lower() for name in names)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        headers = Headers(scope=scope)
        host, origin = headers.get("host", ""), headers.get("origin")
        if not self._is_ours(host):
            words = "This server does not go by the name in the request. Start it with --names if it should."
            await _words(HTTPStatus.MISDIRECTED_REQUEST, words)(scope, receive, send_with_headers)
        elif origin is not None and origin.partition("://")[2] != host:
            await _words(HTTPStatus.FORBIDDEN, "Pages of other sites are not answered.")(
                scope, receive, send_with_headers
            )
        else:
            await self.app(scope, receive, send_with_headers)

    def _is_ours(self, host: str) -> bool:
        name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
        if name.lower().rstrip(".") in self.names:
            return True
        try:
            ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
        except ValueError:
            return False
        return True


def _fixed(path: str, text: str, kind: str) -> Route:
    async def get(request: Request) -> Response:
        return Response(text, media_type=kind)

    return Route(path, get)


def _words(status: HTTPStatus, reason: str) -> Response:
    return JSONResponse({"error": reason}, status)


async def _refuse(request: Request, error: Exception) -> Response:
    if isinstance(error, Refused):
        return _words(error.status, error.reason)
    if isinstance(error, HTTPException):
        return JSONResponse({"error": error.detail}, error.status_code, error.headers)
    return _words(HTTPStatus.INTERNAL_SERVER_ERROR, "Something went wrong; the server's console says what.")
