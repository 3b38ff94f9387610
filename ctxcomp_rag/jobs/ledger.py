"""What a job still has to compress, what is under way, and what goes into the index: the only one who writes there."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from ctxcomp_rag.chunking import Chunk
from ctxcomp_rag.compressors import Compressor
from ctxcomp_rag.errors import InputError
from ctxcomp_rag.index import MemoryIndex
from ctxcomp_rag.index.folder import folder_bytes
from ctxcomp_rag.index.rows import span_from_bytes
from ctxcomp_rag.jobs.reading import Split
from ctxcomp_rag.jobs.report import Progress
from ctxcomp_rag.spans import MemorySpan

if TYPE_CHECKING:
    import pyarrow as pa

_COMMIT_BYTES = 64 * 2**20
_LEARN_FROM = 10_000  # slots of the first commit to an index whose codec learns; faiss asks for 39 x 256
_SHORTEST_PAUSE = 2.0  # seconds between commits of little
_WRITE_SHARE = 0.04  # of the job's time: a commit of little waits until writing has taken less


@dataclass
class _Open:
    """A document of which chunks are still to be committed."""

    tokens: int
    waiting: set[str]
    stale: frozenset[str]
    failed: bool = False


@dataclass
class Counts:
    """See `IndexReport`."""

    documents: int = 0
    chunks: int = 0
    added: int = 0
    skipped: int = 0
    removed: int = 0
    source_tokens: int = 0
    slots: int = 0
    compressed: int = 0
    compress_seconds: float = 0.0
    embed_seconds: float = 0.0
    write_seconds: float = 0.0
    finished_tokens: int = 0
    failures: dict[str, str] = field(default_factory=dict)
    replaced: list[str] = field(default_factory=list)


class Ledger:
    """The books of one job. Used by one thread.

    Chunks that are in the index are not compressed again, nor is a text that this job has met before: once its chunk
    is committed, others get a copy of the stored span. A document's outdated chunks are deleted after its new ones are
    committed, so that a job that is killed in between leaves old and new chunks, never neither.

    Args:
        factor: compression factor; None for the compressor's own, and then stored spans of any factor will do.
        on_error: "stop" raises what is wrong with a document or chunk; "skip" books it as a failure.
    """

    def __init__(self, memory: MemoryIndex, compressor: Compressor, factor: float | None,
                 on_error: Literal["stop", "skip"]) -> None:
        self.memory, self.compressor, self.factor, self.on_error = memory, compressor, factor, on_error
        self.counts = Counts()
        self._began = self._last_commit = time.perf_counter()
        self._seen: set[str] = set()
        self._open: dict[str, _Open] = {}
        self._under_way: dict[str, Chunk] = {}
        self._originals: dict[bytes, str] = {}  # digest of a text -> the chunk that has its span
        self._copies: list[tuple[Chunk, str]] = []
        self._made: dict[str, tuple[Chunk, MemorySpan, NDArray[np.float32]]] = {}
        self._made_bytes = self._made_slots = 0
        self._changed: set[str] = set()
        self._stale: set[str] = set()

    @property
    def progress(self) -> Progress:
        """How far the job is."""
        done = self.counts
        return Progress(done.documents, done.finished_tokens, folder_bytes(self.memory.path), len(done.failures),
                        time.perf_counter() - self._began)

    # -- before the workers

    def plan(self, window: Sequence[Split]) -> list[Chunk]:
        """The chunks of these documents that have to be compressed."""
        fit = [split for split in window if self._fits(split)]
        chunks = [c for split in fit for c in split.chunks]
        missing = self.memory.missing(c.id for c in chunks)
        stored = self.memory.stored(c.id for c in chunks if c.id not in missing)
        todo = []
        for split in fit:
            new = [c for c in split.chunks if c.id in missing or self._differs(c, *stored[c.id])]
            self._changed |= {c.id for c in new} - missing
            self._book(split, new)
            here = {c.id for c in split.chunks} - {c.id for c in new}
            self.counts.slots += sum(stored[chunk_id][1] for chunk_id in here)
            for chunk in split.chunks:
                if chunk.id in here:
                    self._originals.setdefault(_digest(chunk.text), chunk.id)
            for chunk in new:
                if not self._is_copy(chunk):
                    self._under_way[chunk.id] = chunk
                    todo.append(chunk)
        return todo

    def _fits(self, split: Split) -> bool:
        error = split.error
        if error is None and split.document_id in self._seen:
            error = InputError(f"the document id {split.document_id!r} was given twice; ids must be unique")
        self._seen.add(split.document_id)
        if error is not None:
            if self.on_error == "stop":
                raise error
            self.counts.failures[split.document_id] = str(error)
        return error is None

    def _differs(self, chunk: Chunk, metadata: object, num_slots: int) -> bool:
        return dict(chunk.metadata) != metadata or (
            self.factor is not None and num_slots != self.compressor.chunk_slots(chunk, self.factor))

    def _book(self, split: Split, new: Sequence[Chunk]) -> None:
        tokens = sum(c.num_tokens for c in split.chunks)
        stale = self.memory.chunk_ids(split.document_id) - {c.id for c in split.chunks}
        if stale:
            self.counts.replaced.append(split.document_id)
        self.counts.chunks += len(split.chunks)
        self.counts.skipped += len(split.chunks) - len(new)
        self.counts.source_tokens += tokens
        self._open[split.document_id] = _Open(tokens, {c.id for c in new}, stale)
        if not new:
            self._close(split.document_id)

    def _is_copy(self, chunk: Chunk) -> bool:
        """Whether the chunk's text was met before; then the chunk waits for the next commit."""
        digest = _digest(chunk.text)
        original = self._originals.get(digest, chunk.id)
        if original != chunk.id and (
                original in self._under_way or original in self._made or not self.memory.missing([original])):
            self._copies.append((chunk, original))
            return True
        self._originals[digest] = chunk.id
        return False

    # -- behind the workers

    def take(self, result: pa.Table) -> None:
        """Book what a worker has made (see `SpanWorker`)."""
        flat = result["vector"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        good = len(result) - result["vector"].null_count
        vectors = iter(flat.reshape(good, -1) if good else ())
        for row in result.drop_columns(["vector"]).to_pylist():
            self.counts.compress_seconds += row["compress_seconds"]
            self.counts.embed_seconds += row["embed_seconds"]
            vector = next(vectors) if row["reason"] is None else None
            chunk = self._under_way.pop(row["chunk_id"], None)
            if chunk is None:  # made twice, after a worker had died
                continue
            if vector is None:
                self._fail(chunk, row["reason"])
                continue
            self._made[chunk.id] = chunk, span_from_bytes(row["span"]), vector
            self._made_slots += self._made[chunk.id][1].num_slots
            self._made_bytes += len(row["span"])
            self.counts.compressed += 1

    def _fail(self, chunk: Chunk, reason: str) -> None:
        if self.on_error == "stop":
            raise InputError(reason)
        failed = [chunk, *(copy for copy, original in self._copies if original == chunk.id)]
        self._copies = [entry for entry in self._copies if entry[1] != chunk.id]
        for each in failed:
            self.counts.failures[each.document_id] = reason
            self._changed.discard(each.id)
            self._open[each.document_id].failed = True
            self._finish(each)

    def _finish(self, chunk: Chunk) -> None:
        document = self._open[chunk.document_id]
        document.waiting.discard(chunk.id)
        if not document.waiting:
            self._close(chunk.document_id)

    def _close(self, document_id: str) -> None:
        document = self._open.pop(document_id)
        self.counts.finished_tokens += document.tokens
        if not document.failed:  # the old chunks of a document that failed are better than none
            self.counts.documents += 1
            self._stale |= document.stale

    # -- the index

    @property
    def due(self) -> bool:
        """Whether it is time to commit."""
        if self.memory.is_learning and self._made_slots < _LEARN_FROM:
            return False
        now = time.perf_counter()
        affordable = self.counts.write_seconds <= _WRITE_SHARE * (now - self._began)
        return self._made_bytes >= _COMMIT_BYTES or (affordable and now - self._last_commit >= _SHORTEST_PAUSE)

    def commit(self) -> None:
        """Write everything that is made. What was committed stays, whatever happens to the job."""
        began = time.perf_counter()
        if self._made:
            chunks, spans, vectors = zip(*self._made.values(), strict=True)
            self._delete_changed(chunks)
            self.counts.added += self.memory.add(chunks, spans, np.stack(vectors), spec=self.compressor.spec).added
            self.counts.slots += self._made_slots
            self._made, self._made_bytes, self._made_slots = {}, 0, 0
            for chunk in chunks:
                self._finish(chunk)
        self._commit_copies()
        if self._stale:
            self.counts.removed += self.memory.delete(chunk_ids=self._stale)
            self._stale = set()
        self._last_commit = time.perf_counter()
        self.counts.write_seconds += self._last_commit - began

    def _commit_copies(self) -> None:
        ready = [entry for entry in self._copies if entry[1] not in self._under_way]
        if not ready:
            return
        self._copies = [entry for entry in self._copies if entry[1] in self._under_way]
        chunks, originals = zip(*ready, strict=True)
        self._delete_changed(chunks)
        self.counts.added += self.memory.add_copies(chunks, originals).added
        self.counts.slots += sum(slots for _, slots in self.memory.stored(c.id for c in chunks).values())
        for chunk in chunks:
            self._finish(chunk)

    def _delete_changed(self, chunks: Sequence[Chunk]) -> None:
        changed = self._changed & {c.id for c in chunks}
        if changed:
            self.counts.removed += self.memory.delete(chunk_ids=changed)
            self._changed -= changed


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()[:16]
