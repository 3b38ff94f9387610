"""What turns a batch of chunks into spans and vectors, wherever it runs: in a thread, in a process, as an actor.

Batches come and go as Arrow tables, which processes and clusters carry as they are. In: see `chunks_to_table`. Out, one
row a chunk: chunk_id; span, the bytes of a safetensors file; vector; reason, null unless the chunk could not be
compressed; compress_seconds and embed_seconds, the row's share of the batch's.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ctxcomp_rag.backbone import load_frozen
from ctxcomp_rag.chunking import Chunk
from ctxcomp_rag.compressors import Compressor, load_trained_compressor
from ctxcomp_rag.errors import CtxcompError, IncompatibleSpanError
from ctxcomp_rag.index.inputs import places_of_chunks
from ctxcomp_rag.index.rows import CHUNK_COLUMNS, metadata_to_json, row_to_chunk, span_to_bytes
from ctxcomp_rag.retention import with_retention
from ctxcomp_rag.retrieval import Embeddings, RetrievalEncoder, embed_texts, load_retrieval_encoder
from ctxcomp_rag.spans import MemorySpan

if TYPE_CHECKING:
    import pyarrow as pa

_Made = tuple[MemorySpan | None, Embeddings | None, str | None]
"""A span, its chunk's vector (d,), and why there are none."""


def chunks_to_table(chunks: Sequence[Chunk]) -> pa.Table:
    """One row a chunk, with the columns of an index that describe it; metadata as JSON."""
    import pyarrow as pa

    values = [[c.id, c.document_id, c.start, c.end, c.num_tokens, c.text, metadata_to_json(c.metadata, c.id)]
              for c in chunks]
    return pa.table(dict(zip(CHUNK_COLUMNS, zip(*values, strict=True), strict=True)))


@dataclass(frozen=True)
class WorkerSettings:
    """What a worker in another process loads; every field can be sent there.

    Attributes:
        model, compressor, budget, latent, retention, target_retention: see `CompressedRAG.create`; folders as they are
            seen from the worker.
        dtype: of the decoder's weights, so that spans are the same wherever they are made.
        encoder: name of the retrieval encoder.
        factor: compression factor; None for the compressor's own.
        fingerprint: of the spans that have to come out.
        device: "cuda:1", "cpu", ...; None for the default.
    """

    model: str
    compressor: str
    dtype: str
    encoder: str
    fingerprint: str
    factor: float | None = None
    budget: str | None = None
    latent: bool = False
    retention: bool = False
    target_retention: float | None = None
    device: str | None = None

    def with_absolute_paths(self) -> WorkerSettings:
        """The same for a worker with another current folder."""
        def absolute(name: str) -> str:
            return str(Path(name).absolute()) if Path(name).is_dir() else name

        return replace(self, model=absolute(self.model), compressor=absolute(self.compressor),
                       encoder=absolute(self.encoder))

    def load(self) -> tuple[Compressor, RetrievalEncoder]:
        """
        Raises:
            ModelLoadError: something is not there where the worker runs.
            IncompatibleSpanError: what is there makes other spans.
        """
        backbone = load_frozen(self.model, dtype=self.dtype, device=self.device)
        compressor = load_trained_compressor(self.compressor, backbone, self.budget)
        compressor = compressor.latent if self.latent else compressor
        if compressor.spec.fingerprint != self.fingerprint:
            raise IncompatibleSpanError(
                f"a worker loaded the compressor {compressor.spec.compressor} for {compressor.spec.decoder}, which "
                f"makes other spans than the index holds (fingerprint {compressor.spec.fingerprint} instead of "
                f"{self.fingerprint}); put the same files on every machine")
        compressor = with_retention(compressor, measured=self.retention, target=self.target_retention)
        return compressor, load_retrieval_encoder(self.encoder, device=self.device)


class SpanWorker:
    """Compresses and embeds batches."""

    def __init__(self, compressor: Compressor, encoder: RetrievalEncoder, *, factor: float | None = None) -> None:
        self.compressor, self.encoder, self.factor = compressor, encoder, factor
        self._seconds = [0.0, 0.0]  # compressing, embedding

    def __call__(self, batch: pa.Table) -> pa.Table:
        """See the module. A chunk that cannot be compressed does not keep the others of its batch from it."""
        import pyarrow as pa

        self._seconds = [0.0, 0.0]
        chunks = [row_to_chunk(row) for row in batch.to_pylist()]
        spans, vectors, reasons = zip(*self._made(chunks), strict=True)
        compressing, embedding = ([seconds / len(chunks)] * len(chunks) for seconds in self._seconds)
        return pa.table({
            "chunk_id": pa.array([c.id for c in chunks], pa.string()),
            "span": pa.array([span and span_to_bytes(span) for span in spans], pa.large_binary()),
            "vector": pa.array(vectors, pa.list_(pa.float32())),
            "reason": pa.array(reasons, pa.string()),
            "compress_seconds": pa.array(compressing, pa.float64()),
            "embed_seconds": pa.array(embedding, pa.float64()),
        })

    def _made(self, chunks: Sequence[Chunk]) -> list[_Made]:
        try:
            began = time.perf_counter()
            spans = self.compressor.compress(chunks, compression_factor=self.factor)
            compressed = time.perf_counter()
            vectors = embed_texts(self.encoder, [c.text for c in chunks])
            self._seconds[0] += compressed - began
            self._seconds[1] += time.perf_counter() - compressed
            places_of_chunks(chunks, spans, vectors, self.compressor.spec, vectors.shape[1])
            return [(span, vector, None) for span, vector in zip(spans, vectors, strict=True)]
        except (CtxcompError, torch.OutOfMemoryError) as error:
            if len(chunks) == 1:
                return [(None, None, str(error))]
        half = len(chunks) // 2
        return self._made(chunks[:half]) + self._made(chunks[half:])


class LoadingSpanWorker(SpanWorker):
    """A worker that loads its own compressor where it runs."""

    def __init__(self, settings: WorkerSettings) -> None:
        from transformers.utils import logging

        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        super().__init__(*settings.load(), factor=settings.factor)
