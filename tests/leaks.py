"""What is left of requests that are over."""

from __future__ import annotations

import asyncio
import gc

from ctxcomp_rag import Ticket


async def requests_left() -> int:
    """Requests that anybody still holds, once scheduler, event loop and garbage collector have had time."""
    for _ in range(20):
        await asyncio.sleep(0.3)
        gc.collect()
        left = sum(type(o) is Ticket for o in gc.get_objects())
        if not left:
            break
    return left
