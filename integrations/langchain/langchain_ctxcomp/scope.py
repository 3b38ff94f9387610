"""Scopes: a reference is good only where it was minted.

A scope travels in the run's configuration, under a key with leading underscores: such keys are passed to every step of
a chain and are not copied into traces. Without one, retriever and model of the same `SpanChat` share a scope of this
process: a plain chain works, and a reference of one call is good in the next. `with_span_scope` gives every call its
own.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any
from weakref import WeakKeyDictionary

from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import Runnable, RunnableBinding, RunnableConfig, RunnableLambda
from langchain_core.runnables.config import ensure_config

from ctxcomp_rag import SpanChat, new_scope

SCOPE_KEY = "__ctxcomp_scope"
_CALL: ContextVar[str | None] = ContextVar("ctxcomp_scope", default=None)
_SHARED: WeakKeyDictionary[SpanChat, str] = WeakKeyDictionary()
_LOCK = threading.Lock()


def current_scope(chat: SpanChat) -> str:
    """The scope of the running call or chain, or the one that all calls of this `SpanChat` share."""
    if found := _CALL.get() or _configured(None):
        return found
    with _LOCK:
        return _SHARED.setdefault(chat, new_scope())


@contextmanager
def scope_of(config: RunnableConfig | None) -> Iterator[None]:
    """Make the scope of a call's own configuration the current one.

    LangChain shows a configuration to the steps of a chain, but not to a model or retriever that is called directly.
    """
    token = _CALL.set(_configured(config))
    try:
        yield
    finally:
        _CALL.reset(token)


def _configured(config: RunnableConfig | None) -> str | None:
    scope = (ensure_config(config).get("configurable") or {}).get(SCOPE_KEY)
    return scope if isinstance(scope, str) and scope else None


def with_span_scope(runnable: Runnable[Any, Any], *, scope: str | None = None) -> Runnable[Any, Any]:
    """The chain with a scope of its own for every call (each item of a batch, each stream).

    Args:
        scope: a fixed one instead, of a tenant or a conversation. It must be hard to guess: see `new_scope`.
    """

    def choose(config: RunnableConfig) -> RunnableConfig:
        if scope is None and _configured(config):
            return {}  # a chain inside a scoped chain stays in its scope
        return {"configurable": {SCOPE_KEY: scope or new_scope()}}

    if isinstance(runnable, BaseRetriever):  # which shows its configuration to no retriever inside it; a step does
        runnable = RunnableLambda(runnable.invoke, afunc=runnable.ainvoke)
    # the factory runs once for every call, and once for every item of a batch
    return RunnableBinding(bound=runnable, kwargs={}, config_factories=[choose])


__all__ = ["SCOPE_KEY", "current_scope", "scope_of", "with_span_scope"]
