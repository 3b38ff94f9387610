"""A real server on a free port of this machine, in a thread of the test's process."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx
import uvicorn
from fastapi import FastAPI
from openai import OpenAI

from ctxcomp_rag import CompressedRAG, FrozenDecoder, RequestScheduler
from ctxcomp_rag.decoding import RequestLimits
from ctxcomp_rag.serving.app import create_app
from ctxcomp_rag.serving.backends import Backend, LocalBackend
from ctxcomp_rag.serving.gate import GateLimits
from ctxcomp_rag.serving.server import listening, make_server
from ctxcomp_rag.serving.service import SpanService
from ctxcomp_rag.serving.tenants import Tenants, new_key
from tests.gate import PATIENCE, eventually

MODEL = "tiny"


@dataclass
class Served:
    """A running server, its parts, and one key for each of two tenants."""

    url: str
    server: uvicorn.Server
    service: SpanService
    backend: Backend
    keys: dict[str, str]

    def client(self, tenant: str = "acme", **options: Any) -> OpenAI:
        """The real client, with the tenant's key; it does not retry."""
        return OpenAI(base_url=f"{self.url}/v1", api_key=self.keys.get(tenant, tenant), max_retries=0, timeout=PATIENCE,
                      **options)

    def call(self, **body: Any) -> socket.socket:
        """A chat request on a bare connection, for a caller that goes away."""
        data = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "Who?"}], **body}).encode()
        address = urlsplit(self.url)
        caller = socket.create_connection((str(address.hostname), int(address.port or 0)), PATIENCE)
        head = {"Host": "x", "Content-Type": "application/json", "Content-Length": f"{len(data)}",
                "Authorization": f"Bearer {self.keys['acme']}"}
        lines = ["POST /v1/chat/completions HTTP/1.1", *(f"{name}: {value}" for name, value in head.items()), "", ""]
        caller.sendall("\r\n".join(lines).encode() + data)
        return caller

    def metric(self, line: str) -> float:
        """The value of one line of the metrics page; 0 where it is not there yet."""
        for row in httpx.get(f"{self.url}/metrics").text.splitlines():
            if row.startswith(f"{line} "):
                return float(row.rsplit(" ", 1)[1])
        return 0.0


@contextmanager
def serving(rag: CompressedRAG, *, backend: Backend | None = None, gate: GateLimits | None = None,
            limits: RequestLimits | None = None, shutdown_seconds: int = 20, **service: Any) -> Iterator[Served]:
    """Start, wait until it answers, stop."""
    made = {tenant: new_key(tenant) for tenant in ("acme", "other")}
    chosen = backend or LocalBackend(RequestScheduler(FrozenDecoder(rag.backbone), limits=limits))
    spans = SpanService(rag, **service)
    app = create_app(spans, chosen, model=MODEL, tenants=Tenants(line for _, line in made.values()),
                     limits=gate or GateLimits())
    with running(app, shutdown_seconds) as (url, server):
        yield Served(url, server, spans, chosen, {t: key for t, (key, _) in made.items()})


@contextmanager
def running(app: FastAPI, shutdown_seconds: int = 20) -> Iterator[tuple[str, uvicorn.Server]]:
    """An application on a free port: its address, and what stops it."""
    listener = listening("127.0.0.1", 0)
    port = listener.getsockname()[1]
    server = make_server(app, shutdown_seconds=shutdown_seconds)
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    assert eventually(lambda: server.started)
    try:
        yield f"http://127.0.0.1:{port}", server
    finally:
        server.should_exit = True
        thread.join(PATIENCE)
        assert not thread.is_alive()
