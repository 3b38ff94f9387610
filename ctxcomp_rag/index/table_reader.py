"""What is read from a version of the table, wherever its rows lie: every way of asking, over one way of fetching."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from ctxcomp_rag.chunking import Chunk
from ctxcomp_rag.errors import IndexDamagedError
from ctxcomp_rag.index.folder import folder_bytes
from ctxcomp_rag.index.rows import CHUNK_COLUMNS, REPAIR, Row, checked_bytes, checked_row, intact_text, row_to_chunk
from ctxcomp_rag.index.tables import read_tables
from ctxcomp_rag.spans import MemorySpan

if TYPE_CHECKING:
    import pyarrow as pa

ROWS_PER_READ = 64
WITHOUT_SPAN = [*CHUNK_COLUMNS, "num_slots", "num_source_tokens", "vector", "crc"]
TEXT_COLUMNS = [*CHUNK_COLUMNS, "num_slots", "num_source_tokens", "text_crc"]


@dataclass(frozen=True, eq=False)
class Names:
    """Which chunk is in which row: what is asked for every chunk of a corpus, and so must not need the disk."""

    EMPTY: ClassVar[Names]
    rows: dict[str, int]
    documents: dict[str, list[str]]

    def plus(self, added: Iterable[tuple[str, str, int]]) -> Names:
        """With these (chunk id, document id, row id)."""
        rows, new = dict(self.rows), defaultdict[str, list[str]](list)
        for chunk_id, document_id, row_id in added:
            rows[chunk_id] = row_id
            new[document_id].append(chunk_id)
        # lists are replaced, not extended: older versions of the table share them
        return Names(rows, self.documents | {d: self.documents.get(d, []) + chunks for d, chunks in new.items()})

    def minus(self, row_ids: set[int]) -> Names:
        rows = {chunk_id: row_id for chunk_id, row_id in self.rows.items() if row_id not in row_ids}
        documents = {}
        for document_id, chunk_ids in self.documents.items():
            left = chunk_ids if all(c in rows for c in chunk_ids) else [c for c in chunk_ids if c in rows]
            if left:
                documents[document_id] = left
        return Names(rows, documents)


Names.EMPTY = Names({}, {})


@dataclass(frozen=True, eq=False)
class FilterColumns:
    """What a filter looks at, with each distinct value once.

    Attributes:
        row_ids: (n,).
        by_document: document id -> places in `row_ids`.
        distinct: the different metadata.
        metadata: (n,) places in `distinct`.
    """

    row_ids: NDArray[np.int64]
    by_document: dict[str, NDArray[np.int64]]
    distinct: list[dict[str, Any]]
    metadata: NDArray[np.int64]


class TableReader(ABC):
    """One version of the table, read only. Every method may be called from several threads.

    Attributes:
        version: the Lance version.
        folder: where the tables of codecs lie.
        unreadable: data files that cannot be read, with the reason; their rows are not in `rows`.
        altered: the manifest of this version is not what was written, although it can be read.
        remedy: what the message about a damaged chunk tells to do.
    """

    remedy: str = REPAIR

    def __init__(self, version: int, folder: Path) -> None:
        self.version, self.folder = version, folder
        self.unreadable: dict[str, str] = {}
        self.altered = False
        self._names = Names.EMPTY

    @property
    def rows(self) -> dict[str, int]:
        """Chunk id -> row id, for every readable row, oldest first."""
        return self._names.rows

    @property
    def documents(self) -> dict[str, list[str]]:
        """Document id -> its chunk ids, oldest first."""
        return self._names.documents

    # -- what a kind of table has to say

    @abstractmethod
    def _scan(self, columns: Sequence[str], row_ids: Sequence[int] | None = None) -> pa.Table:
        """Those of the given rows that exist, or all rows, in no particular order, with their `_rowid`; of a span only
        where it lies, as a struct with at least its `size`."""

    @abstractmethod
    def _stream(self, columns: Sequence[str], row_ids: Sequence[int]) -> Iterator[pa.RecordBatch]:
        """Like `_scan` of any number of rows, piece by piece; other rows may be among them."""

    @abstractmethod
    def _with_spans(self, columns: Sequence[str], row_ids: Sequence[int]) -> tuple[pa.Table, list[Any]]:
        """`_scan`, and the bytes of the spans of its rows as buffers."""

    @abstractmethod
    def latest(self) -> Self | None:
        """The newest version, or None where this is it."""

    @abstractmethod
    def count_rows(self) -> int:
        """Rows that are stored, counted by Lance; as many as `rows`, unless files are unreadable."""

    def newer_unreadable(self) -> Path | None:
        """The manifest of a version after this one that cannot be read, if there is one."""
        return None

    def uncached(self) -> TableReader:
        """The same rows, read anew from where they are stored."""
        return self

    def require_answers(self, row_ids: Sequence[int]) -> None:
        """Raises IndexUnreachableError where the store of these rows does not hand out what it has."""
        return

    def stored_bytes(self) -> int:
        """Bytes of all files of the index."""
        return folder_bytes(self.folder)

    # -- asking

    def read_chunks(self, row_ids: Sequence[int]) -> dict[int, Chunk]:
        """Row id -> chunk, without the spans and unchecked."""
        found: dict[int, Chunk] = {}
        for batch in batches(row_ids, 4096):
            table = self._scan(CHUNK_COLUMNS, batch)
            found |= {row["_rowid"]: row_to_chunk(row) for row in table.to_pylist()}
        return found

    def texts(self, row_ids: Sequence[int]) -> Iterator[tuple[int, str, str]]:
        """(row id, chunk id, text) of those of the given rows that exist, in no particular order and unchecked."""
        wanted = set(row_ids)
        if not wanted:
            return
        for batch in self._stream(["chunk_id", "text"], row_ids):
            columns = (batch[name].to_pylist() for name in ("_rowid", "chunk_id", "text"))
            yield from (entry for entry in zip(*columns, strict=True) if entry[0] in wanted)

    def read_rows(self, row_ids: Sequence[int]) -> dict[int, tuple[Chunk, MemorySpan, NDArray[np.float32]]]:
        """Row id -> (chunk, span, vector (vector_size,)), checked against the checksum.

        Raises:
            IndexDamagedError: names the chunk whose bytes are not those that were written.
        """
        tables_of = partial(read_tables, self.folder)
        with self._forgetting(row_ids):
            return {row["_rowid"]: (*checked_row(row, vector, tables_of, remedy=self.remedy), vector)
                    for row, vector in self._whole_rows(row_ids)}

    def stored_rows(self, row_ids: Sequence[int]) -> dict[int, Row]:
        """Row id -> the row as it is stored; raises IndexDamagedError as `read_rows` does."""
        with self._forgetting(row_ids):
            return {row["_rowid"]: checked_bytes(row, vector, self.remedy)
                    for row, vector in self._whole_rows(row_ids)}

    @contextmanager
    def _forgetting(self, row_ids: Sequence[int]) -> Iterator[None]:
        """Where one of these rows is damaged, keep none of them: the files may be put back."""
        try:
            yield
        except IndexDamagedError:
            self._forget(row_ids)
            raise

    def _forget(self, row_ids: Sequence[int]) -> None:  # noqa: B027 - most tables keep no rows
        """Read these anew next time."""

    def _whole_rows(self, row_ids: Sequence[int]) -> Iterator[tuple[dict[str, Any], NDArray[np.float32]]]:
        """(columns with the span's bytes, vector) of those of the given rows that exist, unchecked."""
        for batch in batches(row_ids, ROWS_PER_READ):
            table, spans = self._with_spans(WITHOUT_SPAN, batch)
            found = zip(table.drop_columns(["vector"]).to_pylist(), spans, vectors_of(table), strict=True)
            yield from (({**row, "span": span}, vector) for row, span, vector in found)

    def read_settings(self, row_ids: Sequence[int]) -> dict[str, tuple[dict[str, Any], int]]:
        """Chunk id -> (metadata, number of slots), without texts, vectors and spans."""
        found: dict[str, tuple[dict[str, Any], int]] = {}
        for batch in batches(row_ids, 4096):
            table = self._scan(["chunk_id", "metadata", "num_slots"], batch)
            found |= {r["chunk_id"]: (json.loads(r["metadata"]), r["num_slots"]) for r in table.to_pylist()}
        return found

    def vector_batches(self, row_ids: NDArray[np.int64]) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        """(row ids (n,), vectors (n, vector_size)) of those of the given rows that exist, in no particular order."""
        if not len(row_ids):
            return
        wanted_ids = np.sort(row_ids)
        for batch in self._stream(["vector"], row_ids.tolist()):
            batch_ids = batch["_rowid"].to_numpy().astype(np.int64)
            places = np.minimum(np.searchsorted(wanted_ids, batch_ids), len(wanted_ids) - 1)
            wanted = wanted_ids[places] == batch_ids
            if wanted.any():
                flat = batch["vector"].flatten().to_numpy(zero_copy_only=False)
                yield batch_ids[wanted], flat.reshape(len(batch_ids), -1)[wanted]

    def vectors(self, row_ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """All of `vector_batches` at once."""
        batches = list(self.vector_batches(row_ids))
        if not batches:
            return np.empty(0, np.int64), np.empty((0, 1), np.float32)
        return np.concatenate([ids for ids, _ in batches]), np.concatenate([rows for _, rows in batches])

    def in_text_order(self, chunk_ids: Sequence[str]) -> list[str]:
        """The same chunk ids, sorted by where the chunks begin and end."""
        places: list[tuple[int, int, str]] = []
        for batch in batches([self.rows[c] for c in chunk_ids], 4096):
            table = self._scan(["start", "end", "chunk_id"], batch)
            places += zip(*(table[name].to_pylist() for name in ("start", "end", "chunk_id")), strict=True)
        return [chunk_id for _, _, chunk_id in sorted(places)]

    @cached_property
    def filter_columns(self) -> FilterColumns:
        """Read on first use and kept as long as this version of the table."""
        table = self._scan(["document_id", "metadata"])
        metadata = table["metadata"].combine_chunks().dictionary_encode()
        documents = table["document_id"].combine_chunks().dictionary_encode()
        codes = documents.indices.to_numpy(zero_copy_only=False)
        order = np.argsort(codes, kind="stable")
        parts = np.split(order, np.cumsum(np.bincount(codes, minlength=len(documents.dictionary)))[:-1])
        return FilterColumns(
            table["_rowid"].to_numpy().astype(np.int64),
            dict(zip(documents.dictionary.to_pylist(), parts, strict=False)),
            [json.loads(text) for text in metadata.dictionary.to_pylist()],
            metadata.indices.to_numpy(zero_copy_only=False),
        )

    def totals(self) -> dict[str, int]:
        """Sums over all rows, from the small columns only."""
        import pyarrow.compute as pc

        table = self._scan(["text", "num_slots", "num_source_tokens", "span"])
        spans = table["span"].combine_chunks()
        return {
            "span_bytes": pc.sum(spans.field("size")).as_py() or 0,
            "text_bytes": pc.sum(pc.binary_length(table["text"])).as_py() or 0,
            "source_tokens": pc.sum(table["num_source_tokens"]).as_py() or 0,
            "slots": pc.sum(table["num_slots"]).as_py() or 0,
        }

    def intact_texts(self, row_ids: Sequence[int]) -> dict[int, tuple[Chunk, int]]:
        """Row id -> (chunk, slots) of those rows whose text is as it was written, whatever became of their spans."""
        found = {}
        for row_id in row_ids:  # one by one: a page that cannot be read costs no other row
            try:
                (row,) = self._scan(TEXT_COLUMNS, [row_id]).to_pylist()
            except Exception:
                continue
            intact = intact_text(row)
            if intact is not None:
                found[row_id] = intact
        return found

    def texts_of_unreadable(self) -> dict[str, list[tuple[Chunk, int]]]:
        """Unreadable data file -> (chunk, slots) of its rows, where all their texts are as they were written."""
        return {}


def names_in(table: pa.Table) -> Names:
    """From the columns `_rowid`, `chunk_id` and `document_id`."""
    columns = (table[name].to_pylist() for name in ("_rowid", "chunk_id", "document_id"))
    # compaction may have changed the order of the files
    return Names.EMPTY.plus((chunk, document, row) for row, chunk, document in sorted(zip(*columns, strict=True)))


def vectors_of(table: pa.Table) -> NDArray[np.float32]:
    """(rows, vector_size) of the column `vector`."""
    if not len(table):
        return np.empty((0, 0), np.float32)
    return np.asarray(table["vector"].combine_chunks().flatten(), dtype=np.float32).reshape(len(table), -1)


def batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
