"""Whole rows of a table by their ids: what is small of those that are asked for again stays in memory.

Spans are read from their files, and every row is checked against its checksum, each time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
from cachetools import LRUCache
from numpy.typing import NDArray

from ctxcomp_rag.index.lance_reader import panics_are_errors
from ctxcomp_rag.index.read_cache import ReadCache
from ctxcomp_rag.index.span_files import SpanFiles
from ctxcomp_rag.index.table_reader import ROWS_PER_READ, WITHOUT_SPAN, batches, vectors_of

_KEPT_BYTES: Final = 2**26
_BESIDE: Final = 2048  # bytes of a row's other columns, as Python keeps them


class SmallRow(NamedTuple):
    """A row but for its span. `address`, `place`: see `SpanFiles.read`."""

    columns: dict[str, Any]
    vector: NDArray[np.float32]
    address: int
    place: Mapping[str, Any]

    @property
    def nbytes(self) -> int:
        """About what it takes in memory."""
        return len(self.columns["text"]) + len(self.columns["metadata"]) + self.vector.nbytes + _BESIDE


class StoredRows:
    """The rows of one version of a Lance table. Thread-safe."""

    def __init__(self, dataset: Any) -> None:
        self._dataset, self._spans = dataset, SpanFiles(dataset)
        self._small: ReadCache[int, SmallRow] = ReadCache(
            self._take, LRUCache(_KEPT_BYTES, getsizeof=lambda row: row.nbytes))

    def read(self, row_ids: Sequence[int]) -> Iterator[tuple[dict[str, Any], NDArray[np.float32]]]:
        """Columns with the span's bytes, and the vector, of those of the given rows that exist."""
        # a query reads a few rows, and others will ask for them too; a job reads every row once
        take = self._small.read if len(row_ids) <= ROWS_PER_READ else self._take
        for batch in batches(row_ids, ROWS_PER_READ):
            rows = take(batch).values()
            with panics_are_errors():
                spans = self._spans.read([row.address for row in rows], [row.place for row in rows])
            yield from (({**row.columns, "span": span}, row.vector) for row, span in zip(rows, spans, strict=True))

    def _take(self, row_ids: Sequence[int]) -> dict[int, SmallRow]:
        with panics_are_errors():
            # a scan with a filter takes three times as long
            table = self._dataset._take_rows(list(row_ids), [*WITHOUT_SPAN, "_rowid", "_rowaddr", "span"])
        columns = table.drop_columns(["vector", "_rowaddr", "span"]).to_pylist()
        rows = zip(columns, vectors_of(table), table["_rowaddr"].to_pylist(), table["span"].to_pylist(), strict=True)
        return {row["_rowid"]: SmallRow(row, _own(vector), address, place) for row, vector, address, place in rows}

    def forget(self, row_ids: Sequence[int]) -> None:
        """Take these from the table next time."""
        self._small.forget(row_ids)


def _own(vector: NDArray[np.float32]) -> NDArray[np.float32]:
    """A copy that nobody changes; a view would keep all rows that were read with it in memory."""
    kept = vector.copy()
    kept.flags.writeable = False
    return kept
