"""Runs the application until it is told to stop, then finishes what is running."""

from __future__ import annotations

import ipaddress
import socket

import uvicorn
from fastapi import FastAPI

from ctxcomp_rag.errors import InputError
from ctxcomp_rag.serving.tenants import Tenants


def require_keys_outside(host: str, tenants: Tenants) -> None:
    """Raises InputError where others could call and nobody asks who they are."""
    if not tenants.needs_key and not _is_loopback(host):
        raise InputError(f"without API keys the server is for this machine only, got --host {host}; make a key with "
                         "ctxcomp api-key NAME >> FILE and pass --keys FILE, or use --host 127.0.0.1")


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens there; port 0 is any free one. Raises InputError where that cannot be."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise InputError(f"cannot listen on {host} port {port}: {error.strerror or error}; choose another --port or "
                         "--host") from error


def make_server(app: FastAPI, *, shutdown_seconds: int) -> uvicorn.Server:
    """A server whose `run(sockets=[...])` returns after SIGINT or SIGTERM (or `should_exit`).

    Args:
        shutdown_seconds: time that running requests get to finish; after it they are cancelled.
    """
    config = uvicorn.Config(app, log_level="warning", access_log=False, server_header=False,
                            timeout_graceful_shutdown=shutdown_seconds)
    return uvicorn.Server(config)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
