"""The HTTP server of `alma serve`: OpenAI's routes over models in this process.

    app = App({"name": generator}, Limits()).asgi()

Prompts become tokens in one thread, and answers are generated in `max_running` others, so the event loop only moves
bytes: a client that reads slowly, or not at all, holds its own answer and nothing else. Every request has a deadline,
a size, and a place in a bounded queue. What fails becomes an error of the request, in OpenAI's shape.
"""

import asyncio
import contextlib
import functools
import hmac
import json
import secrets
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from pipeline.serve.answers import Answer, event
from pipeline.serve.generator import Generator, Token
from pipeline.serve.requests import ChatRequest, CompletionRequest, Job, Refused, job, parsed
from pipeline.serve.web_page import web_page

STEP = 0.2  # seconds between looks at whether a client has gone


@dataclass(frozen=True)
class Limits:
    """What a request may cost."""

    max_new_tokens: int = 4096
    """Of an answer."""
    max_body: int = 1_000_000
    """Bytes."""
    max_running: int = 2
    """Requests that are generated at a time."""
    max_waiting: int = 64
    """Requests that wait for that; more are refused with 429."""
    timeout: float = 300.0
    """Seconds for a request, with its wait, until the last byte is sent."""


class Cancelled(Exception):
    """Nobody waits for this answer any more."""


class App:
    """Models, the requests that are being answered, and counters."""

    def __init__(self, models: dict[str, Generator], limits: Limits, api_key: str | None = None):
        self.models, self.limits, self._key = models, limits, api_key
        self._prepare = ThreadPoolExecutor(1, "prompt")
        self._generate = ThreadPoolExecutor(limits.max_running, "generate")
        self._slots = asyncio.Semaphore(limits.max_running)
        self._num_waiting = self._num_running = 0
        self._codes: Counter[int] = Counter()
        self._tokens: Counter[str] = Counter()
        self._closing = threading.Event()
        self._begin = int(time.time())

    def asgi(self) -> Starlette:
        routes = [
            Route("/v1/chat/completions", self._counted(self._chat), methods=["POST"]),
            Route("/v1/completions", self._counted(self._completions), methods=["POST"]),
            Route("/v1/models", self._counted(self._list), methods=["GET"]),
            Route("/v1/models/{name:path}", self._counted(self._one), methods=["GET"]),
            Route("/", self._page, methods=["GET"]),
            Route("/health", self._health, methods=["GET"]),
            Route("/metrics", self._metrics, methods=["GET"]),
        ]
        handlers = {HTTPException: self._http_error}
        return Starlette(routes=routes, exception_handlers=handlers, lifespan=self._lifespan)

    @contextlib.asynccontextmanager
    async def _lifespan(self, app) -> AsyncIterator[None]:
        yield
        self._closing.set()
        self._generate.shutdown(cancel_futures=True)
        self._prepare.shutdown(cancel_futures=True)

    # ---- every request -----------------------------------------------------------------------------------------------

    def _counted(self, handler):
        """A route whose errors are answers, and which counts how it ended."""

        async def route(request: Request) -> Response:
            try:
                self._check_key(request)
                response = await handler(request)
            except Refused as error:
                response = JSONResponse(error.body(), error.status, error.headers)
            except ClientDisconnect:
                response = Response(status_code=499)
            except Exception:
                response = JSONResponse(_internal().body(), 500)
            self._codes[response.status_code] += 1
            return response

        return route

    def _check_key(self, request: Request) -> None:
        if self._key is None:
            return
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if not hmac.compare_digest(given.encode(), self._key.encode()):
            raise Refused(401, "the API key is missing or wrong", code="invalid_api_key")

    async def _http_error(self, request: Request, error: HTTPException) -> Response:
        """No such route, or another method."""
        self._codes[error.status_code] += 1
        message = f"{request.method} {request.url.path}: {error.detail}"
        return JSONResponse(Refused(error.status_code, message).body(), error.status_code, error.headers)

    async def _body(self, request: Request):
        """The JSON of a request. Raises Refused."""
        length = request.headers.get("content-length", "0")
        most = self.limits.max_body
        too_large = Refused(413, f"the body is larger than {most:,} bytes", code="request_too_large")
        if length.isdigit() and int(length) > most:
            raise too_large
        data = b""
        try:
            async with asyncio.timeout(min(30.0, self.limits.timeout)):
                async for part in request.stream():
                    data += part
                    if len(data) > most:
                        raise too_large
        except TimeoutError:
            raise Refused(408, "the body did not arrive in time", kind="timeout") from None
        try:
            return json.loads(data)
        except (ValueError, RecursionError) as error:
            raise Refused(400, f"the body is not JSON: {str(error)[:200]}", code="invalid_json") from None

    def _model(self, name: str) -> Generator:
        if name not in self.models:
            names = ", ".join(self.models)
            message = f"there is no model {name[:200]!r} here; this server has {names}"
            raise Refused(404, message, param="model", code="model_not_found")
        return self.models[name]

    # ---- routes ------------------------------------------------------------------------------------------------------

    async def _chat(self, request: Request) -> Response:
        return await self._answer(request, ChatRequest)

    async def _completions(self, request: Request) -> Response:
        return await self._answer(request, CompletionRequest)

    def _card(self, name: str) -> dict:
        return {"id": name, "object": "model", "created": self._begin, "owned_by": "alma"}

    async def _list(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._card(name) for name in self.models]})

    async def _one(self, request: Request) -> Response:
        name = request.path_params["name"]
        self._model(name)
        return JSONResponse(self._card(name))

    async def _page(self, request: Request) -> Response:
        """The chat page. It has nothing to hide, so it needs no key; what it asks for does."""
        html, headers = web_page()
        return HTMLResponse(html, headers=headers)

    async def _health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok", "running": self._num_running, "waiting": self._num_waiting})

    async def _metrics(self, request: Request) -> Response:
        """In Prometheus' text format."""
        lines = ["# TYPE alma_requests_total counter"]
        lines += [f'alma_requests_total{{code="{code}"}} {count}' for code, count in sorted(self._codes.items())]
        lines.append("# TYPE alma_tokens_total counter")
        lines += [f'alma_tokens_total{{kind="{kind}"}} {self._tokens[kind]}' for kind in ("prompt", "generated")]
        gauges = {"running": self._num_running, "waiting": self._num_waiting}
        for name, value in gauges.items():
            lines += [f"# TYPE alma_requests_{name} gauge", f"alma_requests_{name} {value}"]
        return PlainTextResponse("\n".join(lines) + "\n", media_type="text/plain; version=0.0.4")

    # ---- answers -----------------------------------------------------------------------------------------------------

    async def _answer(self, request: Request, kind) -> Response:
        deadline = time.monotonic() + self.limits.timeout
        asked = parsed(kind, await self._body(request))
        generator = self._model(asked.model)
        loop = asyncio.get_running_loop()
        made = await loop.run_in_executor(self._prepare, job, asked, generator, self.limits.max_new_tokens)
        answer = Answer(made, generator)
        run = Run(self, made, generator, deadline)
        if made.stream:
            # Its first token is awaited here, so that what is wrong with a request is an answer with its own code.
            items = run.tokens(request)
            first = await anext(items)
            return Stream(_events(answer, first, items), deadline)
        rows: list[list[Token]] = [[] for _ in range(made.num_rows)]
        async with contextlib.aclosing(run.tokens(request)) as items:
            async for row, token in items:
                rows[row].append(token)
        return JSONResponse(answer.complete(rows))

    def join_queue(self) -> None:
        """Count a request as waiting. Raises Refused if there is no place. Looking and counting are one step of the
        loop, so that requests which arrive together cannot pass the limit together."""
        if self._num_waiting + self._num_running >= self.limits.max_waiting + self.limits.max_running:
            message = f"{self._num_waiting} requests wait already; try again later"
            raise Refused(429, message, kind="rate_limit_error", code="server_busy", headers={"Retry-After": "5"})
        self._num_waiting += 1

    def leave_queue(self) -> None:
        self._num_waiting -= 1

    async def generated(self, work, stop_waiting, deadline: float) -> None:
        """Run `work` in a thread, when there is a slot; `stop_waiting` is called once there is. Raises Refused if there
        is none in time."""
        try:
            async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                await self._slots.acquire()
        except TimeoutError:
            raise _too_slow() from None
        stop_waiting()
        self._num_running += 1
        try:
            await asyncio.get_running_loop().run_in_executor(self._generate, work)
        finally:
            self._num_running -= 1
            self._slots.release()

    def count(self, kind: str, number: int) -> None:
        self._tokens[kind] += number

    def is_closing(self) -> bool:
        return self._closing.is_set()


class Run:
    """The generation of one request in a thread, and its tokens as they come. The thread's slot is free again when the
    thread ends, whether or not the client has read its answer. Raises Refused if the queue is full."""

    def __init__(self, app: App, made: Job, generator: Generator, deadline: float):
        self._app, self._job, self._generator, self._deadline = app, made, generator, deadline
        self._cancelled = threading.Event()
        self._loop, self._queue = asyncio.get_running_loop(), asyncio.Queue()
        app.join_queue()
        self._is_waiting = True
        self._task = asyncio.create_task(self._supervise())

    async def _supervise(self) -> None:
        try:
            await self._app.generated(self._work, self._stop_waiting, self._deadline)
        except Refused as error:
            self._queue.put_nowait(error)

    def _stop_waiting(self) -> None:
        if self._is_waiting:
            self._is_waiting = False
            self._app.leave_queue()

    async def tokens(self, request: Request) -> AsyncIterator[tuple[int, Token]]:
        """(row, token). Raises Refused, and ClientDisconnect if the client has gone. Generation ends when this iterator
        is closed, or at the deadline."""
        try:
            self._app.count("prompt", self._job.num_prompt_tokens)
            while (item := await self._next(request)) is not None:
                if isinstance(item, Exception):
                    raise item
                self._app.count("generated", 1)
                yield item
        finally:
            self._cancelled.set()
            if self._is_waiting:  # the place in the queue is the next client's
                self._stop_waiting()
                self._task.cancel()

    async def _next(self, request: Request):
        """The next item of the thread."""
        while True:
            seconds = self._deadline - time.monotonic()
            if seconds <= 0:
                raise _too_slow()
            try:
                async with asyncio.timeout(min(seconds, STEP)):
                    return await self._queue.get()
            except TimeoutError:
                if await request.is_disconnected():
                    raise ClientDisconnect() from None

    def _put(self, item) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._queue.put_nowait, item)

    def _work(self) -> None:
        """Generate, in a thread: puts (row, token) for each token, then None, or an exception."""
        try:
            first = 0
            for prompt, seeds in zip(self._job.prompts, self._job.seeds, strict=True):
                if self._cancelled.is_set():
                    return
                on_token = functools.partial(self._take, first)
                self._generator.generate(prompt, self._job.sampling, seeds, on_token)
                first += len(seeds)
            self._put(None)
        except Cancelled:
            self._put(Refused(503, "the server is stopping", kind="server_error", code="server_stopping"))
        except Exception:
            self._put(_internal())

    def _take(self, first: int, choice: int, token: Token) -> None:
        if self._cancelled.is_set() or self._app.is_closing():
            raise Cancelled
        self._put((first + choice, token))


class Stream(StreamingResponse):
    """A stream that ends at a deadline, even if its client reads nothing, and whose generator is always closed."""

    def __init__(self, events: AsyncIterator[str], deadline: float):
        super().__init__(events, media_type="text/event-stream")
        self._deadline = deadline

    async def __call__(self, scope, receive, send) -> None:
        try:
            # a second more, in which the generator can say that it was too slow
            async with asyncio.timeout(max(0.0, self._deadline - time.monotonic()) + 1):
                await super().__call__(scope, receive, send)
        except (TimeoutError, ClientDisconnect, OSError):
            pass  # the server closes a connection whose answer is incomplete
        finally:
            await self.body_iterator.aclose()


async def _events(answer: Answer, first: tuple[int, Token], items) -> AsyncIterator[str]:
    """The events of a stream. An error in its middle is its last event."""
    lengths: Counter[int] = Counter()
    try:
        async with contextlib.aclosing(items):
            for text in answer.first():
                yield text
            item: tuple[int, Token] | None = first
            while item is not None:
                row, token = item
                yield answer.chunk(row, token, lengths[row])
                lengths[row] += len(token.text)
                item = await anext(items, None)
            for text in answer.last():
                yield text
    except Refused as error:
        yield event(error.body())


def _too_slow() -> Refused:
    return Refused(504, "the answer was not complete in time; ask for fewer tokens", kind="timeout", code="timeout")


def _internal() -> Refused:
    """For a fault of the server: its log has the traceback, and the client a number to name."""
    number = secrets.token_hex(4)
    print(f"error {number}\n{traceback.format_exc()}", file=sys.stderr, flush=True)
    return Refused(500, f"the server failed on this request (error {number} in its log)", kind="server_error")
