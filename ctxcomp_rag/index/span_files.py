"""Spans of this machine's files, mapped instead of copied.

    data/<name>.lance           rows, and spans of up to 64 KB
    data/<name>/<blob>.blob     larger spans, several in a file or one

Lance says in which row a span lies, in which blob and where in it; it also reads blobs, at the price of a copy.
"""

from __future__ import annotations

import mmap
import os
import sys
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Final

COLUMNS: Final = ["_rowid", "_rowaddr", "span"]
"""Of a row, what `SpanFiles.read` has to know."""

_PACKED, _DEDICATED = 1, 2  # Lance's kinds of blobs with files of their own
_POPULATE_READ = 22  # madvise's MADV_POPULATE_READ, of Linux 5.14; Python has no name for it


class SpanFiles:
    """The spans of one version of a Lance table. Thread-safe.

    Files are never changed once they are written, so a mapping stays what it was; one that is removed meanwhile leaves
    the disk when the last span that lies in it is let go.
    """

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset
        self._data = Path(dataset.uri) / "data"

    @cached_property
    def _folders(self) -> dict[int, Path]:
        """Fragment id -> folder of its blobs."""
        return {f.fragment_id: self._data / Path(f.metadata.files[0].path).stem for f in self._dataset.get_fragments()}

    def read(self, rows: Sequence[Mapping[str, Any]]) -> list[Any]:
        """Bytes of the spans of rows with the columns `COLUMNS`, as bytes or buffers that must not be written to.

        Raises:
            OSError: a file is not there, or cannot be read.
        """
        found = {row["_rowid"]: self._mapped(row["_rowaddr"], row["span"]) for row in rows}
        others = [row for row in rows if found[row["_rowid"]] is None]
        if others:
            by_address = dict(self._dataset.read_blobs("span", addresses=[row["_rowaddr"] for row in others]))
            found |= {row["_rowid"]: by_address[row["_rowaddr"]] for row in others}
        return [found[row["_rowid"]] for row in rows]

    def _mapped(self, address: int, place: Mapping[str, Any]) -> Any:
        """A span in a file of its own or of several; None where it is to be read by Lance."""
        if sys.platform != "linux" or place["kind"] not in (_PACKED, _DEDICATED):
            return None
        # Lance spreads blobs over names: their number's bits from the lowest on
        name = f"{place['blob_id']:032b}"[::-1] + ".blob"
        try:
            return mapped(self._folders[address >> 32] / name, place["position"], place["size"])
        except (OSError, ValueError):  # Lance says what is wrong with it
            return None


def mapped(file: Path, begin: int, size: int) -> memoryview:
    """`size` bytes of a file from `begin` on, in memory already, which the memoryview keeps mapped.

    Raises:
        OSError: they cannot be read; later, and from a mapping alone, the system would end the process for that.
        ValueError: the file is shorter.
    """
    skipped = begin % mmap.ALLOCATIONGRANULARITY
    descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        pages = mmap.mmap(descriptor, skipped + size, prot=mmap.PROT_READ, offset=begin - skipped)
    finally:
        os.close(descriptor)
    pages.madvise(_POPULATE_READ)
    return memoryview(pages)[skipped:]


__all__ = ["COLUMNS", "SpanFiles", "mapped"]
