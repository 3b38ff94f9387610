"""What has been read already stays in memory, up to a limit; what is missing is read in one go."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Generic, TypeVar

from cachetools import Cache

Key = TypeVar("Key")
Value = TypeVar("Value")


class ReadCache(Generic[Key, Value]):
    """`fetch(keys)` with a memory. Thread-safe.

    Args:
        fetch: key -> value, for those of the given different keys that there are.
        kept: where values stay, and which go when it is full.
    """

    def __init__(self, fetch: Callable[[Sequence[Key]], Mapping[Key, Value]], kept: Cache[Key, Value]) -> None:
        self._fetch, self._kept = fetch, kept
        self._lock = threading.Lock()

    def read(self, keys: Sequence[Key]) -> dict[Key, Value]:
        """Key -> value, of those that there are; missing ones are fetched at once, each once."""
        with self._lock:
            found = {key: known for key in keys if (known := self._kept.get(key)) is not None}
        missing = [key for key in dict.fromkeys(keys) if key not in found]
        if not missing:
            return found
        fetched = self._fetch(missing)
        with self._lock:
            for key, value in fetched.items():
                with suppress(ValueError):  # larger than everything that may be kept
                    self._kept[key] = value
        return {**found, **fetched}

    def forget(self, keys: Iterable[Key]) -> None:
        """Fetch these anew next time."""
        with self._lock:
            for key in keys:
                self._kept.pop(key, None)
