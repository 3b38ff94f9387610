"""Bytes of spans from an object store: those read most often stay in memory, missing ones come in one round."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final, NamedTuple

from cachetools import LFUCache

from ctxcomp_rag.index.read_cache import ReadCache

SPAN_CACHE_BYTES: Final = 256 * 2**20
_AT_ONCE: Final = 64  # requests on their way at a time


class Place(NamedTuple):
    """Where the bytes of a span lie: `size` bytes from `start` of an object."""

    object: str
    start: int
    size: int


class SpanCache:
    """`fetch(place)` for up to 64 places at once, remembering up to `max_bytes` of the answers. Thread-safe.

    The least frequently read go first: with few of many chunks in memory, that serves more reads than dropping the
    least recently read.
    """

    def __init__(self, fetch: Callable[[Place], bytes], max_bytes: int = SPAN_CACHE_BYTES) -> None:
        pool = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="ctxcomp-spans")
        self._cache: ReadCache[Place, bytes] = ReadCache(
            lambda places: dict(zip(places, pool.map(fetch, places), strict=True)), LFUCache(max_bytes, getsizeof=len))

    def read(self, places: Sequence[Place]) -> list[bytes]:
        """The bytes of each place."""
        found = self._cache.read(places)
        return [found[place] for place in places]

    def forget(self, places: Iterable[Place]) -> None:
        """Ask for these anew next time."""
        self._cache.forget(places)
