"""Which chunk has a given text: a table of digests that follows the versions of an index.

Row ids never come back and rows never change, so a new version costs the reading of its new rows only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ctxcomp_rag.index.table_reader import TableReader

_ENTRY = np.dtype([("digest", "S16"), ("row", "i8"), ("chunk", "S32")])  # 56 bytes a chunk


class TextTable:
    """Digests of the texts of an index, sorted; brought up to date by `find`. Not thread-safe."""

    def __init__(self) -> None:
        self._version = -1
        self._entries: NDArray[np.void] = np.empty(0, _ENTRY)
        self.read = 0
        """Texts read so far."""

    def find(self, table: TableReader, texts: Sequence[str]) -> list[str | None]:
        """For each text the id of the oldest chunk of `table` with exactly this text, or None."""
        if table.version != self._version:
            self._follow(table)
        wanted = np.array([_digest(text) for text in texts], "S16")
        starts = np.searchsorted(self._entries["digest"], wanted)
        return [bytes(self._entries[at]["chunk"]).decode()
                if at < len(self._entries) and self._entries[at]["digest"] == digest else None
                for at, digest in zip(starts.tolist(), wanted, strict=True)]

    def _follow(self, table: TableReader) -> None:
        live = np.fromiter(table.rows.values(), np.int64, len(table.rows))
        kept = self._entries[np.isin(self._entries["row"], live)]
        new = np.setdiff1d(live, kept["row"])
        fresh = [(_digest(text), row, chunk.encode()) for row, chunk, text in table.texts(new.tolist())]
        self.read += len(fresh)
        # by digest, then by age
        self._entries = np.sort(np.concatenate([kept, np.array(fresh, _ENTRY)]), order=["digest", "row"])
        self._version = table.version


def _digest(text: str) -> bytes:
    """16 bytes without a zero at the end, which NumPy would take for padding."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:15] + b"."


__all__ = ["TextTable"]
