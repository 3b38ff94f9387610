"""The reading half of an index: search, look up, verify; what the classes that open an index share."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from ctxcomp_rag.chunking import Chunk
from ctxcomp_rag.errors import IndexDamagedError, IndexFolderError, IndexUnreachableError, InputError
from ctxcomp_rag.index.folder import Manifest
from ctxcomp_rag.index.inputs import checked_vectors
from ctxcomp_rag.index.pins import VersionPin
from ctxcomp_rag.index.table_reader import TableReader
from ctxcomp_rag.index.texts import TextTable
from ctxcomp_rag.index.vectors import VectorIndex, best_of, normalised
from ctxcomp_rag.index.verify import VerifyReport, check_rows, check_vectors
from ctxcomp_rag.index.where import Where, matching_rows
from ctxcomp_rag.spans import MemorySpan

T = TypeVar("T")


@dataclass(frozen=True)
class RetrievedSpan:
    """A chunk with its span. `score`: cosine similarity to the query; nan where there was no query."""

    chunk: Chunk
    span: MemorySpan
    score: float


class IndexReader:
    """What can be asked of an index. Attributes: see `MemoryIndex`."""

    def __init__(self, path: Path, location: str, manifest: Manifest, table: TableReader, vectors: VectorIndex) -> None:
        self.path, self.location = path, location
        self.spec, self.vector_size = manifest.spec, manifest.vector_size
        self.retrieval_encoder, self.codec = manifest.retrieval_encoder, manifest.codec
        self._table, self._vectors = table, vectors
        self._pin = VersionPin(path, table.version)
        self._writing = threading.RLock()  # one writing thread at a time
        self._state = threading.RLock()  # `_table` and `_vectors` change together
        self._texts, self._looking = TextTable(), threading.Lock()
        self._closed = False

    def close(self) -> None:
        """Let go of the version that is open."""
        with self._writing:
            self._pin.release()
            self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._table.rows)

    def __repr__(self) -> str:
        return f"MemoryIndex({self.location!r}, {len(self)} chunks, version {self._table.version})"

    @property
    def version(self) -> int:
        """Number of the commit that this object reads. Every write raises it; no two states of a folder share one."""
        return self._table.version

    @property
    def is_writer(self) -> bool:
        """Whether this object holds the writer's lock: nobody else commits, so there is nothing to refresh."""
        return False

    def refresh(self) -> None:
        """See what other processes have committed since.

        Raises:
            IndexFolderError: the index is gone.
            IndexUnreachableError: the object store does not answer.
        """
        with self._writing, self._state:
            try:
                newer = self._table.latest()
            except (IndexDamagedError, IndexUnreachableError):
                raise
            except Exception as error:
                raise IndexFolderError(f"expected the index at {self.location} to be still there, got: {error}. "
                                       f"Was it moved or deleted? Open it where it is now.") from error
            if newer is not None:
                self._publish(newer)

    def _publish(self, table: TableReader) -> None:
        pin = None if self.is_writer or self._closed else VersionPin(self.path, table.version)
        with self._state:
            replay(self._vectors, table)
            self._table = table
        if pin is not None:
            self._pin.release()
            self._pin = pin

    def stored(self, chunk_ids: Iterable[str]) -> dict[str, tuple[dict[str, Any], int]]:
        """Chunk id -> (metadata, number of slots) of those of the given chunks that are there; no span is read."""
        def read(table: TableReader) -> dict[str, tuple[dict[str, Any], int]]:
            return table.read_settings([table.rows[c] for c in chunk_ids if c in table.rows])

        chunk_ids = list(chunk_ids)
        return self._reading(read)

    def get(self, chunk_ids: Sequence[str]) -> list[RetrievedSpan]:
        """Chunks and spans in the order of the ids, checked against their checksums; score is nan.

        Raises:
            InputError: there is no such chunk.
            IndexDamagedError: names a chunk whose bytes are not those that were written.
        """
        def read(table: TableReader) -> list[RetrievedSpan]:
            self._require_known(chunk_ids, table)
            found = table.read_rows([table.rows[c] for c in dict.fromkeys(chunk_ids)])
            return [RetrievedSpan(*found[table.rows[c]][:2], math.nan) for c in chunk_ids]

        return self._reading(read)

    def search(self, vectors: NDArray[Any], top_k: int, *, where: Where | None = None) -> list[list[RetrievedSpan]]:
        """The `top_k` nearest chunks of each query with their spans, best first.

        Args:
            vectors: (q, vector_size), or (vector_size,) for one query; any length.
            where: metadata key, or "document_id", to a value or a list of values; all have to match. Applied before
                the best are chosen, so that `min(top_k, matches)` chunks come back.

        Returns:
            One list per query; scores are cosine similarities.

        Raises:
            InputError: top_k below 1, vectors of another size, NaN.
            IndexDamagedError: names a chunk whose bytes are not those that were written.
        """
        def read(table: TableReader, hits: list[list[tuple[int, float]]]) -> list[list[RetrievedSpan]]:
            found = table.read_rows(sorted({row_id for hit in hits for row_id, _ in hit}))
            return [[RetrievedSpan(*found[row_id][:2], score) for row_id, score in hit] for hit in hits]

        return self._searching(vectors, top_k, where, read)

    def search_chunks(self, vectors: NDArray[Any], top_k: int, *, where: Where | None = None
                      ) -> list[list[tuple[Chunk, float]]]:
        """Like `search`, but without reading the spans: for rerankers, evaluation, and plain text."""
        def read(table: TableReader, hits: list[list[tuple[int, float]]]) -> list[list[tuple[Chunk, float]]]:
            found = table.read_chunks(sorted({row_id for hit in hits for row_id, _ in hit}))
            return [[(found[row_id], score) for row_id, score in hit] for hit in hits]

        return self._searching(vectors, top_k, where, read)

    def vectors(self, chunk_ids: Sequence[str]) -> NDArray[np.float32]:
        """Unit vectors (len(chunk_ids), vector_size) of chunks; raises InputError for an unknown one."""
        def read(table: TableReader) -> NDArray[np.float32]:
            self._require_known(chunk_ids, table)
            wanted = np.array([table.rows[c] for c in chunk_ids], np.int64)
            if self._vectors.exact:
                return self._vectors.vectors(wanted)
            ids, stored = table.vectors(wanted)
            order = np.argsort(ids)
            return normalised(stored[order][np.searchsorted(ids[order], wanted)])

        return self._reading(read)

    def _require_known(self, chunk_ids: Iterable[str], table: TableReader) -> None:
        unknown = [c for c in chunk_ids if c not in table.rows]
        if unknown:
            raise InputError(f"expected ids of chunks in {self.location}, got {unknown[0]!r}"
                             f"{f' and {len(unknown) - 1} more unknown ones' if len(unknown) > 1 else ''}.")

    def chunk_ids(self, document_id: str) -> frozenset[str]:
        """Ids of a document's chunks, from memory; empty for an unknown document."""
        return frozenset(self._table.documents.get(document_id, ()))

    def document_chunks(self, document_id: str) -> list[str]:
        """Ids of a document's chunks in the order of the text; [] for an unknown document."""
        def read(table: TableReader) -> list[str]:
            names = table.documents.get(document_id, [])
            return table.in_text_order(names) if len(names) > 1 else list(names)

        return self._reading(read)

    def chunks_of_texts(self, texts: Sequence[str]) -> list[str | None]:
        """For each text the id of the oldest chunk with exactly this text, or None.

        The first call reads the texts of the index once; later ones only those that were added since.
        """
        def read(table: TableReader) -> list[str | None]:
            with self._looking:
                return self._texts.find(table, texts)

        return self._reading(read)

    def chunks(self) -> Iterator[Chunk]:
        """All chunks, oldest first, without reading spans."""
        names = list(self._table.rows)
        for start in range(0, len(names), 1024):
            def read(table: TableReader, batch: Sequence[str] = names[start : start + 1024]) -> list[Chunk]:
                row_ids = [table.rows[name] for name in batch if name in table.rows]
                found = table.read_chunks(row_ids)
                return [found[row_id] for row_id in row_ids]

            yield from self._reading(read)

    def stats(self) -> dict[str, int]:
        """chunks, documents, bytes (of the folder), span_bytes, text_bytes, source_tokens, slots."""
        def read(table: TableReader) -> dict[str, int]:
            return {"chunks": len(table.rows), "documents": len(table.documents), "bytes": table.stored_bytes(),
                    **table.totals()}

        return self._reading(read)

    def verify(self, *, progress: Callable[[int, int], None] | None = None) -> VerifyReport:
        """Read every row and compare it with its checksum, the specification and the search vectors.

        Search vectors that do not fit are made again from the table; `notes` says so. `progress` is called with the
        number of rows read and of all rows.

        Raises:
            IndexUnreachableError: the object store of the index does not hand out its rows.
        """
        def check(table: TableReader) -> VerifyReport:
            damaged = check_rows(table, self.spec, self.vector_size, progress)
            with self._state:
                current = table.version == self._table.version
                notes = check_vectors(table, self._vectors) if current and not damaged else []
                if notes:
                    self._vectors.remove(self._vectors.ids())
                    self._publish(table)
            return VerifyReport(len(table.rows), damaged, notes)

        return self._reading(check)

    def _searching(self, vectors: NDArray[Any], top_k: int, where: Where | None,
                   read: Callable[[TableReader, list[list[tuple[int, float]]]], list[list[T]]]) -> list[list[T]]:
        if isinstance(top_k, bool) or not isinstance(top_k, int | np.integer) or top_k < 1:
            raise InputError(f"expected top_k of at least 1, got {top_k!r}")
        array = np.asarray(vectors)
        queries = checked_vectors(array[None] if array.ndim == 1 else array, self.vector_size, lambda i: f"query {i}")

        def search(_: TableReader) -> list[list[T]]:
            table = self._table
            among = None if not where else matching_rows(table.filter_columns, where)
            with self._state:
                # unfiltered hits may be rows that came after `table`; hits among its rows can be read from it
                table = self._table if among is None else table
                hits = self._vectors.search(queries, int(top_k), among=among)
                exact = self._vectors.exact
            if not exact:
                found = np.unique(np.concatenate([ids for ids, _ in hits]))
                hits = best_of(queries, hits, *table.vectors(found), int(top_k))
            return read(table, [list(zip(i.tolist(), s.tolist(), strict=True)) for i, s in hits])

        return self._reading(search)

    def _reading(self, read: Callable[[TableReader], T]) -> T:
        """Read from the version that is open; where a writer has compacted it away meanwhile, from the latest."""
        table = self._table
        try:
            return read(table)
        except (InputError, IndexDamagedError, IndexUnreachableError):
            raise
        except Exception:
            pass
        try:
            self.refresh()
            return read(self._table)
        except (InputError, IndexDamagedError, IndexUnreachableError):
            raise
        except Exception as error:
            raise IndexDamagedError(f"expected readable data files in {self.location}, got: {error}. "
                                    f"Run verify() to see which chunks are concerned.") from error


def vectors_for(path: Path, vector_size: int, table: TableReader, *, trust_snapshot: bool) -> tuple[VectorIndex, int]:
    """Search vectors for exactly the rows of `table`, and the version of the snapshot that is on the disk."""
    loaded = VectorIndex.load(path, vector_size) if trust_snapshot else None
    vectors, saved = loaded or (VectorIndex(vector_size), -1)
    replay(vectors, table)
    return vectors, saved


def replay(vectors: VectorIndex, table: TableReader) -> None:
    """Row ids are never given out twice and rows never change, so the ids alone say what differs."""
    live = np.fromiter(table.rows.values(), np.int64, len(table.rows))
    known = vectors.ids()
    vectors.remove(np.setdiff1d(known, live))
    for ids, rows in table.vector_batches(np.setdiff1d(live, known)):
        vectors.add(ids, rows)
