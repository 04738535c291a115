"""The routes: what comes over HTTP, handed to the worker, and its events as OpenAI's objects."""

import asyncio
import hmac
import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from .limits import RequestRefused, ServeLimits
from .page import PAGE, PAGE_HEADERS
from .requests import parse_request
from .worker import Event, Failed, Finished, Job, Piece, Started, Worker, out_of_time

LOOPBACK = ("127.0.0.1", "localhost")
GRACE_S = 1.0  # for the worker to say itself that time is up


class Endpoint:
    """The model behind the routes.

    Args:
        about: what `/v1/models` tells beside the name.
        hosts: that images and videos may be fetched from.
        key: that requests must bring; empty for none.
        has_page: whether `/` is a page to try the model on.
    """

    def __init__(
        self,
        worker: Worker,
        name: str,
        limits: ServeLimits,
        *,
        about: dict[str, Any],
        hosts: Sequence[str] = (),
        key: str = "",
        has_page: bool = False,
    ):
        self.worker, self.name, self.limits = worker, name, limits
        self.about, self.hosts, self.key = about, tuple(hosts), key
        self.has_page = has_page
        self.created = int(time.time())

    def app(self, is_local: bool) -> Starlette:
        """The application. One that is bound to the loopback address (`is_local`) answers to its names alone, so that no page
        in a browser reaches it under a name of its own."""
        routes = [
            Route("/health", self.health),
            Route("/v1/models", self.models),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
        ]
        if self.has_page:
            routes.append(Route("/", self.page))
        middleware = [Middleware(TrustedHostMiddleware, allowed_hosts=list(LOOPBACK))] if is_local else []
        handlers: Any = {RequestRefused: _refused, HTTPException: _http_error}
        return Starlette(routes=routes, middleware=middleware, exception_handlers=handlers)

    async def health(self, request: Request) -> Response:
        """Whether requests are taken: at once, whatever the model does."""
        return JSONResponse({"status": "ok"})

    async def page(self, request: Request) -> Response:
        """The page to try the model on, which asks the routes beside it."""
        return HTMLResponse(PAGE, headers=PAGE_HEADERS)

    async def models(self, request: Request) -> Response:
        """The one model that is served."""
        self._check_key(request)
        model = {"id": self.name, "object": "model", "created": self.created, "owned_by": "tokenflex", **self.about}
        return JSONResponse({"object": "list", "data": [model]})

    async def chat(self, request: Request) -> Response:
        """An answer to a conversation, whole or as server-sent events."""
        self._check_key(request)
        data = await self._read(request)
        asked = await run_in_threadpool(parse_request, data, self.name, self.limits, self.hosts)
        events: asyncio.Queue[Event] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def tell(event: Event) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(events.put_nowait, event)

        job = self.worker.submit(asked, tell)
        answer = _Answer(self.name, job, events, self.limits)
        watch = asyncio.create_task(_cancel_when_gone(request, job))
        try:
            started = await answer.next()
        except RequestRefused:
            watch.cancel()
            raise
        assert isinstance(started, Started)
        if asked.is_stream:
            lines = answer.stream(started, asked.has_usage, watch)
            return StreamingResponse(lines, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        try:
            return JSONResponse(await answer.whole(started))
        finally:
            watch.cancel()

    def _check_key(self, request: Request) -> None:
        given = request.headers.get("authorization", "").encode("utf-8", "replace")
        if self.key and not hmac.compare_digest(given, f"Bearer {self.key}".encode()):
            raise RequestRefused("this server wants its API key", 401, None, "invalid_api_key")

    async def _read(self, request: Request) -> bytes:
        """The body, of which no more than the limit is ever held."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # also what keeps forms of other sites' pages out
            raise RequestRefused(f"content-type: {kind!r}; wanted application/json", 415)
        limit = self.limits.max_body_bytes
        refusal = RequestRefused(
            f"the request has more than {limit} bytes; send fewer or smaller images and videos", 413
        )
        length = request.headers.get("content-length", "")
        if length.isdigit() and int(length) > limit:
            raise refusal
        data = bytearray()
        try:
            async for part in request.stream():
                data += part
                if len(data) > limit:
                    raise refusal
        except ClientDisconnect:
            raise RequestRefused("the request broke off") from None
        return bytes(data)


class _Answer:
    """The events of one job as OpenAI's objects."""

    def __init__(self, name: str, job: Job, events: "asyncio.Queue[Event]", limits: ServeLimits):
        self._job, self._events, self._limits = job, events, limits
        self._common = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": name}

    async def next(self) -> Event:
        """The next event.

        Raises:
            RequestRefused: the request failed, or its time is up.
        """
        left = max(0.0, self._job.deadline - time.monotonic()) + GRACE_S
        try:
            event = await asyncio.wait_for(self._events.get(), left)
        except (asyncio.TimeoutError, TimeoutError):  # one class from Python 3.11 on
            self._job.cancel()
            raise out_of_time(self._limits) from None
        if isinstance(event, Failed):
            raise event.error
        return event

    async def whole(self, started: Started) -> dict[str, Any]:
        text = ""
        while not isinstance(event := await self.next(), Finished):
            assert isinstance(event, Piece)
            text += event.text
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": text},
            "logprobs": None,
            "finish_reason": event.reason,
        }
        return {
            **self._common,
            "object": "chat.completion",
            "choices": [choice],
            "usage": _usage(started, event),
            "tokenflex": {
                "images": [image.as_dict() for image in started.images],
                "seconds": {"prompt": round(started.seconds, 4), "answer": round(event.seconds, 4)},
            },
        }

    async def stream(self, started: Started, has_usage: bool, watch: "asyncio.Task[None]") -> AsyncIterator[str]:
        try:
            yield self._chunk({"role": "assistant", "content": ""})
            while not isinstance(event := await self.next(), Finished):
                assert isinstance(event, Piece)
                yield self._chunk({"content": event.text})
            yield self._chunk({}, event.reason)
            if has_usage:
                yield self._line(choices=[], usage=_usage(started, event))
            yield "data: [DONE]\n\n"
        except RequestRefused as error:  # the status has been sent: the error comes as one more event
            yield f"data: {json.dumps(error.body())}\n\n"
        finally:
            self._job.cancel()
            watch.cancel()

    def _chunk(self, delta: dict[str, Any], reason: str | None = None) -> str:
        return self._line(choices=[{"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}])

    def _line(self, **fields: Any) -> str:
        return f"data: {json.dumps({**self._common, 'object': 'chat.completion.chunk', **fields})}\n\n"


def _usage(started: Started, finished: Finished) -> dict[str, Any]:
    prompt, new = started.num_prompt_tokens, finished.num_new_tokens
    return {
        "prompt_tokens": prompt,
        "completion_tokens": new,
        "total_tokens": prompt + new,
        "prompt_tokens_details": {
            "image_tokens": started.num_image_tokens,
            "cached_tokens": finished.num_cached_tokens,
        },
    }


async def _cancel_when_gone(request: Request, job: Job) -> None:
    """Wait until the client has hung up, and cancel its job."""
    while (await request.receive())["type"] != "http.disconnect":
        continue
    job.cancel()


async def _refused(request: Request, error: RequestRefused) -> Response:
    headers = {"Retry-After": "1"} if error.http_status == 503 else None
    return JSONResponse(error.body(), error.http_status, headers=headers)


async def _http_error(request: Request, error: HTTPException) -> Response:
    refusal = RequestRefused(f"{request.method} {request.url.path}: {error.detail}", error.status_code)
    return JSONResponse(refusal.body(), error.status_code, headers=error.headers)
