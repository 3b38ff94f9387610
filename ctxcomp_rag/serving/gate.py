"""In front of every `/v1/` request, before its body is read: who calls, is there room, and how much may be sent."""

from __future__ import annotations

import time
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ctxcomp_rag.errors import InputError
from ctxcomp_rag.serving.metrics import Metrics
from ctxcomp_rag.serving.protocol import RefusalError
from ctxcomp_rag.serving.tenants import Tenants

RETRY_AFTER = {"Retry-After": "1"}


@dataclass(frozen=True)
class GateLimits:
    """What the server lets in.

    Attributes:
        max_requests: requests in the server at once, waiting ones included; one more is answered 429.
        max_body_bytes: of a request.
        max_messages: of a chat request.
    """

    max_requests: int = 64
    max_body_bytes: int = 2**20
    max_messages: int = 256

    def __post_init__(self) -> None:
        for name in ("max_requests", "max_body_bytes", "max_messages"):
            if getattr(self, name) < 1:
                raise InputError(f"expected {name} of at least 1, got {getattr(self, name)}")


class Gate:
    """ASGI middleware; a request that is let in finds its tenant in `request.state.tenant`."""

    def __init__(self, app: ASGIApp, *, tenants: Tenants, limits: GateLimits, metrics: Metrics) -> None:
        self.app, self.tenants, self.limits, self.metrics = app, tenants, limits, metrics
        self._inside = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith("/v1/"):
            await self.app(scope, receive, send)
            return
        status, began = 500, time.perf_counter()

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self._inside += 1
        try:
            headers = Headers(scope=scope)
            scope.setdefault("state", {})["tenant"] = self._let_in(headers)
            await self.app(scope, _limited(receive, self.limits.max_body_bytes), sending)
        except RefusalError as error:
            await JSONResponse(error.body, error.status, error.headers)(scope, receive, sending)
        finally:
            self._inside -= 1
            route = scope.get("route")  # a path that somebody made up would be a label of its own
            path = str(getattr(route, "path", "other"))
            self.metrics.requests.labels(path, str(status)).inc()
            self.metrics.seconds.labels(path).observe(time.perf_counter() - began)

    def _let_in(self, headers: Headers) -> str:
        tenant = self.tenants.tenant_of(headers.get("authorization"))
        if tenant is None:
            raise RefusalError(401, "expected a known API key in the header Authorization: Bearer KEY",
                               kind="authentication_error", code="invalid_api_key",
                               headers={"WWW-Authenticate": "Bearer"})
        if self._inside > self.limits.max_requests:
            raise RefusalError(429, f"the server has {self.limits.max_requests} requests to answer already; retry "
                               "later", kind="rate_limit_error", code="server_busy", headers=RETRY_AFTER)
        declared = headers.get("content-length", "0")
        if declared.isdecimal() and int(declared) > self.limits.max_body_bytes:
            raise _too_large(self.limits.max_body_bytes)
        return tenant


def _too_large(limit: int) -> RefusalError:
    return RefusalError(413, f"the body of a request may have {limit} bytes; send less text, or references to spans "
                        "from /v1/retrieve", code="request_too_large", headers={"Connection": "close"})


def _limited(receive: Receive, limit: int) -> Receive:
    seen = 0

    async def limited() -> Message:
        nonlocal seen
        message = await receive()
        seen += len(message.get("body", b""))
        if seen > limit:  # the framework reads the body, and lets its own kind of error through
            raise HTTPException(413, str(_too_large(limit)))
        return message

    return limited
