"""Chats as several processes would have them: one index, references of their own under a common key."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ctxcomp_rag import CompressedRAG, SpanChat, SpanReferences

KEY = bytes(range(32))
Make = Callable[..., SpanChat]


@contextmanager
def chats_under_a_key(rag: CompressedRAG) -> Iterator[Make]:
    """Makes a `SpanChat` for each call; closes their schedulers at the end."""
    made: list[SpanChat] = []

    def make(key: bytes = KEY, clock: Callable[[], float] = time.time, on_invalid: Any = "text") -> SpanChat:
        references = SpanReferences("kb", mode="mac", key=key, clock=clock)
        made.append(SpanChat(rag.backbone, rag.memory, references=references, on_invalid=on_invalid))
        return made[-1]

    yield make
    for chat in made:
        chat.scheduler.close()
