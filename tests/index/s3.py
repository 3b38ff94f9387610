"""A local S3 server (moto) that notes every request and can be made to wait, and an index to push there."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import boto3
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

CREDENTIALS = {"AWS_ACCESS_KEY_ID": "reader", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1"}


@dataclass(frozen=True)
class Request:
    """`name`: of the object, below its bucket. `bytes`: what was asked for, as "first-last", "" for all."""

    method: str
    name: str
    bytes: str


class S3Server:
    """Objects in memory, on a port of this machine.

    `requests`: all that came since `forget`, in their order.
    """

    def __init__(self) -> None:
        self._app = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self, threaded=True, request_handler=_Silent)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self.forget()
        self.stalled, self._released = threading.Event(), threading.Event()

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        name = environ["PATH_INFO"].lstrip("/").partition("/")[2]
        request = Request(environ["REQUEST_METHOD"], name, environ.get("HTTP_RANGE", "").removeprefix("bytes="))
        self.requests.append(request)
        if self._held(request):
            self._barrier.wait(timeout=60)
        if self._lost(request):
            self.stalled.set()
            self._released.wait()
            start_response("403 Forbidden", [])
            return [b""]
        return self._app(environ, start_response)

    def forget(self) -> None:
        self.requests: list[Request] = []
        self._held: Callable[[Request], bool] = lambda _: False
        self._lost: Callable[[Request], bool] = lambda _: False

    @contextmanager
    def silent_to(self, which: Callable[[Request], bool]) -> Iterator[None]:
        """Such requests get no answer and change nothing; the event `stalled` says that one is there."""
        self.stalled, self._released = threading.Event(), threading.Event()
        self._lost = which
        try:
            yield
        finally:
            self._lost = lambda _: False
            self._released.set()

    @contextmanager
    def refusing(self, which: Callable[[Request], bool]) -> Iterator[None]:
        """Such requests are refused."""
        with self.silent_to(which):
            self._released.set()
            yield

    @contextmanager
    def together(self, count: int, which: Callable[[Request], bool]) -> Iterator[None]:
        """No such request is answered before `count` of them have been made: one after the other they would fail."""
        self._barrier = threading.Barrier(count)
        self._held = which
        try:
            yield
        finally:
            self._held = lambda _: False

    def gets(self, part: str) -> list[Request]:
        """Requests for the bytes of objects with this in their name."""
        return [r for r in self.requests if r.method == "GET" and part in r.name]

    def bucket(self, name: str) -> Any:
        """A new bucket, as boto3 sees it."""
        resource = boto3.resource("s3", endpoint_url=self.endpoint, region_name="us-east-1",
                                  aws_access_key_id="owner", aws_secret_access_key="secret")
        return resource.create_bucket(Bucket=name)

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class _Silent(WSGIRequestHandler):
    def log(self, *_: Any) -> None:
        pass
