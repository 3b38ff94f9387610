"""The HTTP interface: OpenAI's chat completions over memory spans, with retrieval inside or by reference."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import CancelledError
from contextlib import asynccontextmanager
from typing import Any, cast

from anyio import to_thread
from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from ctxcomp_rag import __version__
from ctxcomp_rag.chat import Stripper
from ctxcomp_rag.errors import CtxcompError, PromptTooLongError, SchedulerFullError, SpanReferenceError
from ctxcomp_rag.index import RetrievedSpan
from ctxcomp_rag.serving.backends import Backend, Running
from ctxcomp_rag.serving.gate import RETRY_AFTER, Gate, GateLimits
from ctxcomp_rag.serving.metrics import Metrics
from ctxcomp_rag.serving.protocol import (
    AnswerBody,
    ChatRequest,
    RefusalError,
    RetrieveRequest,
    reference_body,
    usage_body,
)
from ctxcomp_rag.serving.service import SpanService
from ctxcomp_rag.serving.tenants import Tenants

logger = logging.getLogger(__name__)
router = APIRouter()
_GONE = 499  # nginx' code for a client that closed the connection


class Server:
    """What the endpoints share; `request.app.state.server`."""

    def __init__(self, service: SpanService, backend: Backend, *, model: str, limits: GateLimits,
                 default_max_tokens: int) -> None:
        self.service, self.backend, self.model, self.limits = service, backend, model, limits
        self.default_max_tokens = default_max_tokens
        self.created = int(time.time())
        self.metrics = Metrics(lambda: backend.waiting, lambda: backend.decoding,
                               lambda: service.chat.references.rejected)


def create_app(service: SpanService, backend: Backend, *, model: str, tenants: Tenants | None = None,
               limits: GateLimits | None = None, default_max_tokens: int = 64) -> FastAPI:
    """The application; the end of its lifespan closes the backend.

    Args:
        model: the name that requests call the decoder by.
        tenants: who may call [default: everybody, as one tenant].
        default_max_tokens: longest answer where a request does not say.
    """
    server = Server(service, backend, model=model, limits=limits or GateLimits(),
                    default_max_tokens=default_max_tokens)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await backend.close()

    app = FastAPI(title="ctxcomp-rag", version=__version__, lifespan=lifespan)
    app.state.server = server
    app.include_router(router)
    app.add_middleware(Gate, tenants=tenants or Tenants(), limits=server.limits, metrics=server.metrics)
    app.add_exception_handler(CtxcompError, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _failed)
    return app


# -- endpoints


@router.post("/v1/chat/completions")
async def chat_completions(request: Request, body: ChatRequest) -> Response:
    """Answer the last user message from the chunks nearest to it, or from the spans the messages refer to."""
    began = time.perf_counter()
    server = _server(request)
    if body.model != server.model:
        raise RefusalError(404, f"there is no model {body.model!r} here; expected {server.model!r}",
                           code="model_not_found", param="model")
    if len(body.messages) > server.limits.max_messages:
        raise RefusalError(400, f"expected at most {server.limits.max_messages} messages, got {len(body.messages)}",
                           param="messages")
    settings = body.settings(server.default_max_tokens)
    prepared = await to_thread.run_sync(server.service.prepare, body, request.state.tenant)
    running = await server.backend.start(prepared.parts, settings)
    answer = _Answer(server, running, AnswerBody(server.model, prepared.sources), began)
    if body.stream:
        with_usage = body.stream_options is not None and body.stream_options.include_usage
        return _EventStream(answer, with_usage)
    return await answer.whole(request)


@router.post("/v1/retrieve")
async def retrieve(request: Request, body: RetrieveRequest) -> dict[str, Any]:
    """The chunks nearest to a query, each with a reference that stands for its span in this tenant's messages."""
    service = _server(request).service
    tenant: str = request.state.tenant

    def find() -> list[tuple[RetrievedSpan, str]]:
        sources = service.retrieve(body.query, body.top_k, body.where)
        return list(zip(sources, service.references(sources, tenant), strict=True))

    return {"object": "list", "data": [reference_body(s, r) for s, r in await to_thread.run_sync(find)],
            "expires_in": service.chat.references.seconds}


@router.get("/v1/models")
async def models(request: Request) -> dict[str, Any]:
    """The one model that is served."""
    return {"object": "list", "data": [_model_body(_server(request))]}


@router.get("/v1/models/{model:path}")
async def model(request: Request, model: str) -> dict[str, Any]:
    """The model, by name."""
    server = _server(request)
    if model != server.model:
        raise RefusalError(404, f"there is no model {model!r} here; expected {server.model!r}", code="model_not_found",
                           param="model")
    return _model_body(server)


@router.get("/health/live")
async def live() -> dict[str, str]:
    """The process answers."""
    return {"status": "live"}


@router.get("/health")
@router.get("/health/ready")
async def ready(request: Request) -> JSONResponse:
    """Requests would be decoded; 503 otherwise."""
    good = await _server(request).backend.ready()
    return JSONResponse({"status": "ready" if good else "unavailable"}, 200 if good else 503)


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Counters in Prometheus' form."""
    return Response(_server(request).metrics.page(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _server(request: Request) -> Server:
    return cast(Server, request.app.state.server)


def _model_body(server: Server) -> dict[str, Any]:
    return {"id": server.model, "object": "model", "created": server.created, "owned_by": "ctxcomp-rag"}


# -- answers


class _Answer:
    """One answer on its way out, whole or as events; white space is taken off both ends, as `CompressedRAG` does."""

    def __init__(self, server: Server, running: Running, body: AnswerBody, began: float) -> None:
        self.server, self.running, self.body, self.began = server, running, body, began

    async def _pieces(self) -> AsyncIterator[str]:
        stripper, waited = Stripper(), False
        try:
            async for piece in self.running.apieces():
                if not waited:
                    self.server.metrics.first_piece.observe(time.perf_counter() - self.began)
                    waited = True
                if shown := stripper.feed(piece):
                    yield shown
        except (asyncio.CancelledError, GeneratorExit, CancelledError):
            self.running.cancel()
            self.server.metrics.cancelled.inc()
            raise

    async def _end(self) -> tuple[str, dict[str, Any]]:
        made = await self.running.aresult()
        self.server.metrics.count(made)
        return made.finish_reason, usage_body(made.usage, made.completion_tokens)

    async def whole(self, request: Request) -> Response:
        watching = asyncio.create_task(self._cancel_when_gone(request))
        try:
            text = "".join([piece async for piece in self._pieces()])
            finish_reason, usage = await self._end()
        except CancelledError:
            return Response(status_code=_GONE)
        finally:
            watching.cancel()
        return JSONResponse(self.body.whole(text, finish_reason, usage))

    async def _cancel_when_gone(self, request: Request) -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self.running.cancel()

    async def events(self, with_usage: bool) -> AsyncIterator[str]:
        try:
            yield _event(self.body.first_chunk())
            async for piece in self._pieces():
                yield _event(self.body.chunk({"content": piece}))
            finish_reason, usage = await self._end()
            yield _event(self.body.chunk({}, finish_reason))
            if with_usage:
                yield _event(self.body.usage_chunk(usage))
            yield "data: [DONE]\n\n"
        except Exception as error:  # the status is sent already: the error is an event
            yield _event(refusal_of(error).body)


class _EventStream(StreamingResponse):
    """Server-sent events; however it ends, also before its first one, nobody decodes on."""

    def __init__(self, answer: _Answer, with_usage: bool) -> None:
        super().__init__(answer.events(with_usage), media_type="text/event-stream",
                         headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._running = answer.running

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._running.cancel()


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


# -- errors


def refusal_of(error: Exception) -> RefusalError:
    """The HTTP answer to an error; what is not the caller's fault is logged and not shown."""
    if isinstance(error, RefusalError):
        return error
    if isinstance(error, PromptTooLongError):
        return RefusalError(400, str(error), code="context_length_exceeded", param="messages")
    if isinstance(error, SpanReferenceError):
        return RefusalError(400, f"{error} (reason: {error.reason})", code="invalid_reference", param="messages")
    if isinstance(error, SchedulerFullError):
        return RefusalError(429, str(error), kind="rate_limit_error", code="server_busy", headers=RETRY_AFTER)
    if isinstance(error, CtxcompError) and isinstance(error, ValueError):
        return RefusalError(400, str(error))
    logger.error("a request failed", exc_info=error)
    return RefusalError(500, "the server failed to answer; its log says why", kind="server_error")


async def _refused(_: Request, error: Exception) -> Response:
    refusal = refusal_of(error)
    return JSONResponse(refusal.body, refusal.status, refusal.headers)


async def _failed(request: Request, error: Exception) -> Response:
    return await _refused(request, error)


async def _invalid(request: Request, error: Exception) -> Response:
    problems: Sequence[dict[str, Any]] = cast(RequestValidationError, error).errors()
    first = problems[0]
    place = ".".join(str(p) for p in first["loc"] if p != "body")
    unknown = first["type"] == "extra_forbidden"
    message = f"{place or 'the body'}: {first['msg']}"
    return await _refused(request, RefusalError(400, message, param=place or None,
                                                code="unsupported_parameter" if unknown else None))


async def _http_error(request: Request, error: Exception) -> Response:
    failed = cast(HTTPException, error)
    code = "request_too_large" if failed.status_code == 413 else None
    return await _refused(request, RefusalError(failed.status_code, str(failed.detail), code=code))
