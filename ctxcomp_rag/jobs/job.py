"""The job: read, plan, compress, commit, each as far ahead of the next as its bounds allow."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Literal

from ctxcomp_rag.chunking import Chunk, Document, split_document
from ctxcomp_rag.compressors import Compressor
from ctxcomp_rag.errors import InputError
from ctxcomp_rag.index import MemoryIndex
from ctxcomp_rag.jobs.batches import batches_by_length
from ctxcomp_rag.jobs.ledger import Ledger
from ctxcomp_rag.jobs.reading import ReadAhead, Split
from ctxcomp_rag.jobs.report import IndexReport, Progress
from ctxcomp_rag.jobs.stopping import Stop
from ctxcomp_rag.jobs.workers import Workers

BATCH_TOKENS = 8192
"""Tokens of a batch, padding included."""
_WINDOW_BATCHES = 16  # batches whose chunks are sorted by length together
_WINDOW_DOCUMENTS = 1024
_TICK = 0.05  # seconds


def precompress(documents: Iterable[Document], memory: MemoryIndex, compressor: Compressor, workers: Workers, *,
                factor: float | None = None, overlap_tokens: int = 0, max_chunk_tokens: int | None = None,
                batch_tokens: int = BATCH_TOKENS, on_error: Literal["stop", "skip"] = "stop",
                progress: Callable[[Progress], None] | None = None, stop: Stop | None = None) -> IndexReport:
    """Chunk, compress and store documents. Running it again adds only what is missing.

    Documents are read as they are needed: what is in memory does not grow with their number, but for the index's own
    table of ids. A document whose id is known already is replaced.

    Args:
        compressor: the one that the workers have; it is only asked for sizes here.
        workers: they are closed at the end.
        on_error: "skip" reports a document that cannot be used in `failures` and goes on.
        progress: called after every commit.
        stop: when it is requested, batches that a worker has begun are finished and committed, and the report says
            `stopped`.

    Raises:
        IndexLockedError: somebody else writes to the index; nothing was read.
        InputError: settings that cannot be met; with "stop", the first document that cannot be used. What was
            compressed before is committed.
        WorkerError: workers died again and again.
    """
    try:
        if batch_tokens < 1:
            raise InputError(f"expected batches of at least 1 token, got {batch_tokens}")
        limit = compressor.chunk_limit(max_chunk_tokens)
        compressor.num_slots(limit, factor)  # refuses a factor that cannot be made before anything is written
        memory.lock_for_writing()
        ledger = Ledger(memory, compressor, factor, on_error)
        tokenizer = compressor.backbone.tokenizer

        def split(document: Document) -> list[Chunk]:
            return split_document(document, tokenizer, max_tokens=limit, overlap_tokens=overlap_tokens)

        job = _Job(ReadAhead(documents, split), ledger, workers, batch_tokens, progress, stop or Stop())
        return job.run()
    finally:
        workers.close()


class _Job:
    def __init__(self, reader: ReadAhead, ledger: Ledger, workers: Workers, batch_tokens: int,
                 progress: Callable[[Progress], None] | None, stop: Stop) -> None:
        self._reader, self._ledger, self._workers, self._stop = reader, ledger, workers, stop
        self._batch_tokens, self._progress = batch_tokens, progress
        self._window: list[Split] = []
        self._window_tokens = 0
        self._batches: deque[list[Chunk]] = deque()
        self._began = time.perf_counter()

    def run(self) -> IndexReport:
        try:
            while not self._stop.requested and not self._done:
                self._step()
            self._drain()
        except Exception:
            self._drain_after_an_error()
            raise
        finally:
            self._reader.close()
        c = self._ledger.counts
        if not c.documents and not c.failures and not self._stop.requested:
            raise InputError("the corpus is empty: no document was given")
        return IndexReport(c.documents, c.chunks, c.added, c.skipped, c.removed, c.source_tokens, c.slots,
                           time.perf_counter() - self._began, c.failures, tuple(c.replaced), c.compressed,
                           c.compress_seconds, c.embed_seconds, c.write_seconds, self._stop.requested)

    @property
    def _done(self) -> bool:
        return self._reader.ended and not (self._window or self._batches or self._workers.in_flight)

    def _step(self) -> None:
        while self._batches and self._workers.in_flight < self._workers.depth:
            self._workers.submit(self._batches.popleft())
        if len(self._batches) < _WINDOW_BATCHES and not self._reader.ended:
            self._read()
        if not self._batches and self._reader.ended:
            self._plan()
        # with batches to hand out, or a full house, the next thing to happen is a result
        busy = self._workers.in_flight >= self._workers.depth or self._reader.ended
        self._collect(_TICK if busy else 0)

    def _read(self) -> None:
        """Take documents until the window is full, or the workers have nothing to do."""
        while not self._reader.ended:
            taken = self._reader.take(_TICK if self._workers.in_flight < self._workers.depth else 0.001)
            if taken is None:
                break
            self._window.append(taken)
            self._window_tokens += sum(c.num_tokens for c in taken.chunks)
            if self._full:
                break
        if self._full or (not self._workers.in_flight and not self._batches):
            self._plan()

    @property
    def _full(self) -> bool:
        return self._window_tokens >= _WINDOW_BATCHES * self._batch_tokens or len(self._window) >= _WINDOW_DOCUMENTS

    def _plan(self) -> None:
        window, self._window, self._window_tokens = self._window, [], 0
        if window:
            self._batches += batches_by_length(self._ledger.plan(window), self._batch_tokens)

    def _collect(self, timeout: float) -> None:
        for result in self._workers.finished(timeout):
            self._ledger.take(result)
        if self._ledger.due:
            self._commit()

    def _commit(self) -> None:
        self._ledger.commit()
        if self._progress:
            self._progress(self._ledger.progress)

    def _drain(self) -> None:
        """Finish what workers have begun, and commit."""
        self._workers.cancel()
        while self._workers.in_flight:
            self._collect(_TICK)
        self._commit()

    def _drain_after_an_error(self) -> None:
        """The same, but the error that is under way matters more than what goes wrong on the way out."""
        try:
            self._drain()
        except Exception:
            return
