"""Bytes of spans from an object store: those read most often stay in memory, missing ones come in one round."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final, NamedTuple

from cachetools import LFUCache

SPAN_CACHE_BYTES: Final = 256 * 2**20
_AT_ONCE: Final = 64  # requests on their way at a time


class Place(NamedTuple):
    """Where the bytes of a span lie: `size` bytes from `start` of an object."""

    object: str
    start: int
    size: int


class SpanCache:
    """`fetch(place)` for many places at once, remembering up to `max_bytes` of the answers. Thread-safe.

    The least frequently read go first: with few of many chunks in memory, that serves more reads than dropping the
    least recently read.
    """

    def __init__(self, fetch: Callable[[Place], bytes], max_bytes: int = SPAN_CACHE_BYTES) -> None:
        self._fetch = fetch
        self._known: LFUCache[Place, bytes] = LFUCache(max_bytes, getsizeof=len)
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="ctxcomp-spans")

    def read(self, places: Sequence[Place]) -> list[bytes]:
        """The bytes of each place; up to 64 missing ones are asked for at the same time, each once."""
        with self._lock:
            found = {place: known for place in places if (known := self._known.get(place)) is not None}
        missing = [place for place in dict.fromkeys(places) if place not in found]
        fetched = dict(zip(missing, self._pool.map(self._fetch, missing), strict=True))
        with self._lock:
            for place, data in fetched.items():
                if len(data) <= self._known.maxsize:
                    self._known[place] = data
        found |= fetched
        return [found[place] for place in places]

    def forget(self, places: Iterable[Place]) -> None:
        """Ask for these anew next time."""
        with self._lock:
            for place in places:
                self._known.pop(place, None)
