"""Is every stored chunk what was written?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from ctxcomp_rag.errors import IndexDamagedError
from ctxcomp_rag.index.table_reader import ROWS_PER_READ, TableReader
from ctxcomp_rag.index.vectors import VectorIndex
from ctxcomp_rag.spans import SpanSpec


@dataclass(frozen=True)
class Damage:
    """A chunk that is not what was written. Ids are "" where not even they can be read."""

    chunk_id: str
    document_id: str
    reason: str


@dataclass(frozen=True)
class VerifyReport:
    """What `MemoryIndex.verify` found.

    Attributes:
        chunks: rows that were read.
        damaged: chunks to delete and to compress again.
        notes: what was found and mended.
    """

    chunks: int
    damaged: list[Damage] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.damaged


def check_rows(table: TableReader, spec: SpanSpec, vector_size: int, progress: Callable[[int, int], None] | None = None
               ) -> list[Damage]:
    """Read all rows; the damaged ones, and the files that cannot be read at all.

    Raises:
        IndexUnreachableError: rows cannot be read because the object store does not hand them out; that is no damage.
    """
    stored = table.uncached()
    damaged = [Damage("", "", f"{file} cannot be read: {why}") for file, why in stored.unreadable.items()]
    if stored.altered:
        damaged.append(Damage("", "", f"the manifest of version {stored.version} is not what was written: chunks may "
                                      "be missing"))
    torn = stored.newer_unreadable()
    if torn:
        damaged.append(Damage("", "", f"{torn.name} cannot be read: the last change of the index is missing"))
    names = {row_id: chunk_id for chunk_id, row_id in stored.rows.items()}
    owners = {chunk_id: document_id for document_id, chunks in stored.documents.items() for chunk_id in chunks}
    row_ids = list(names)
    for start in range(0, len(row_ids), ROWS_PER_READ):
        batch = row_ids[start : start + ROWS_PER_READ]
        try:
            _check(stored, batch, spec, vector_size)
        except Exception:
            table.require_answers(batch)  # before rows are read one by one, each of them waiting for an answer
            for row_id in batch:  # to name the chunk
                try:
                    _check(stored, [row_id], spec, vector_size)
                except Exception as error:
                    table.require_answers([row_id])
                    chunk_id = names[row_id]
                    damaged.append(Damage(chunk_id, owners.get(chunk_id, ""), str(error)))
        if progress:
            progress(start + len(batch), len(row_ids))
    return damaged


def _check(table: TableReader, row_ids: Sequence[int], spec: SpanSpec, vector_size: int) -> None:
    found = table.read_rows(row_ids)
    for row_id in row_ids:
        if row_id not in found:
            raise IndexDamagedError(f"row {row_id} is missing")
        _, span, vector = found[row_id]
        spec.require_span(span)
        if vector.shape != (vector_size,) or not np.isfinite(vector).all():
            raise IndexDamagedError(f"its vector is not {vector_size} finite numbers")


def check_vectors(table: TableReader, vectors: VectorIndex) -> list[str]:
    """Whether the search vectors are those of the table's rows; a sentence where they are not."""
    ids = np.sort(np.fromiter(table.rows.values(), np.int64, len(table.rows)))
    same = np.array_equal(np.sort(vectors.ids()), ids) and vectors.agrees_with(table.vector_batches(ids))
    return [] if same else ["the search vectors were not those of the chunks; they were made again"]
