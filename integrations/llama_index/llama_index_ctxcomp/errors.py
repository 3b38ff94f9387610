"""Errors that the synthesizers of llama_index let through."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ctxcomp_rag import CtxcompError


class PromptError(CtxcompError, RuntimeError):
    """A prompt, or a setting of a call, was refused; `__cause__` is the error of ctxcomp-rag.

    No `ValueError`, although its cause mostly is one: `refine` and `compact` take every ValueError for a badly
    structured answer, log it, and return an empty response.
    """


@contextmanager
def audible() -> Iterator[None]:
    """Turn errors that a synthesizer would swallow into ones that it does not."""
    try:
        yield
    except CtxcompError as error:
        if isinstance(error, ValueError):
            raise PromptError(str(error)) from error
        raise


__all__ = ["PromptError", "audible"]
