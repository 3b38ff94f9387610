"""Spans read from the files of a table, large ones mapped instead of copied.

    data/<name>.lance           rows, and spans of up to 64 KB
    data/<name>/<blob>.blob     larger spans, several in a file or one

Its row says where a span lies. Lance also reads it, at the price of copies and of another round of its threads.
"""

from __future__ import annotations

import mmap
import os
import sys
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from ctxcomp_rag.index.lance_reader import blob_file, data_files

_MAPPED_FROM = 2**16  # bytes; less is copied faster than mapped
_POPULATE_READ = 22  # madvise's MADV_POPULATE_READ, of Linux 5.14; Python has no name for it


class SpanFiles:
    """The spans of one version of a Lance table. Thread-safe."""

    def __init__(self, dataset: Any) -> None:
        self._dataset, self._folder = dataset, str(dataset.uri)

    @cached_property
    def _files(self) -> dict[int, str]:
        """Fragment id -> its data file, below the table."""
        return {f.fragment_id: data_files(f)[0] for f in self._dataset.get_fragments()}

    def read(self, addresses: Sequence[int], places: Sequence[Mapping[str, Any]]) -> list[Any]:
        """Bytes of spans, as buffers that must not be written to.

        Args:
            addresses: of the rows that hold them, as Lance counts.
            places: of each, what Lance says of a blob: kind, blob_id, position, size.

        Raises:
            OSError, ValueError: by Lance, of a file that is not there or cannot be read.
        """
        found = [self._bytes(address, place) for address, place in zip(addresses, places, strict=True)]
        missing = [address for address, data in zip(addresses, found, strict=True) if data is None]
        read = dict(self._dataset.read_blobs("span", addresses=missing)) if missing else {}
        return [read[address] if data is None else data for address, data in zip(addresses, found, strict=True)]

    def _bytes(self, address: int, place: Mapping[str, Any]) -> Any:
        """None where the span is for Lance to read."""
        file = blob_file(self._files[address >> 32], place["kind"], place["blob_id"])
        if file is None:
            return None
        try:
            return stretch(f"{self._folder}/{file}", place["position"], place["size"])
        except (OSError, ValueError):  # Lance says what is wrong with it
            return None


def stretch(file: str | Path, begin: int, size: int) -> bytearray | memoryview:
    """`size` bytes of a file from `begin` on. Many of them are mapped: they take no memory of this process.

    A mapping shows the file, so it is for files that nobody changes once they are written; one that is removed
    meanwhile leaves the disk when the last reader lets the mapping go.

    Raises:
        OSError: they cannot be read.
        ValueError: the file is shorter.
    """
    descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if size < _MAPPED_FROM or sys.platform != "linux":
            data = bytearray(size)  # not bytes: torch takes only a buffer that can be written to as it is
            read = os.preadv(descriptor, [data], begin)
            if read < size:
                raise ValueError(f"expected {size} bytes at {begin} of {file}, got {read}")
            return data
        skipped = begin % mmap.ALLOCATIONGRANULARITY
        # private: who writes to it by mistake gets pages of his own
        pages = mmap.mmap(descriptor, skipped + size, flags=mmap.MAP_PRIVATE, offset=begin - skipped)
    finally:
        os.close(descriptor)
    pages.madvise(_POPULATE_READ)  # raises what would otherwise end the process when the bytes are looked at
    return memoryview(pages)[skipped:]


__all__ = ["SpanFiles", "stretch"]
