"""Nodes into an index: what is there already is not compressed again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from llama_index.core.schema import BaseNode

from ctxcomp_rag import Chunk, Compressor, InputError, MemoryIndex, MemorySpan
from llama_index_ctxcomp.chunks import chunk_of

_BATCH = 32  # chunks per commit: a killed job loses at most these


class SpanWriter:
    """Compresses nodes and commits text, vector and span together. One node per document, place and text.

    Args:
        index: open for writing.
        compressor: the one whose spans the index holds.
        compression_factor: the compressor's own by default.
    """

    def __init__(self, index: MemoryIndex, compressor: Compressor, compression_factor: float | None = None) -> None:
        index.spec.require_compressor(compressor.spec)
        compressor.num_slots(compressor.max_chunk_tokens, compression_factor)  # refuses a factor that cannot be made
        self.index, self.compressor, self.compression_factor = index, compressor, compression_factor

    def write(self, nodes: Sequence[BaseNode], *, replace_documents: bool = False) -> int:
        """Store nodes that have embeddings; returns how many spans were made.

        Args:
            replace_documents: the nodes are all that is left of their documents: delete their other chunks.
        """
        for node in nodes:
            if node.embedding is None:
                raise InputError(f"expected nodes with embeddings, but {node.node_id!r} has none; put the embedding "
                                 "model before this step")
        chunks = [chunk_of(node, self._count) for node in nodes]
        latest = {chunk.id: i for i, chunk in enumerate(chunks)}
        places = list(latest.values())
        made = 0
        for start in range(0, len(places), _BATCH):
            batch = places[start : start + _BATCH]
            vectors = np.asarray([nodes[i].embedding for i in batch], dtype=np.float32)
            made += self._commit([chunks[i] for i in batch], vectors)
        if replace_documents:
            documents = {chunk.document_id for chunk in chunks}
            stale = {c for d in documents for c in self.index.document_chunks(d)} - set(latest)
            if stale:
                self.index.delete(chunk_ids=stale)
        return made

    def _count(self, text: str) -> int:
        return len(self.compressor.backbone.tokenizer.encode(text))

    def _commit(self, chunks: list[Chunk], vectors: np.ndarray) -> int:
        missing = self.index.missing([c.id for c in chunks])
        stored = {s.chunk.id: s for s in self.index.get([c.id for c in chunks if c.id not in missing])}
        changed = {c.id for c in chunks if c.id in stored and dict(stored[c.id].chunk.metadata) != dict(c.metadata)}
        resized = {c.id for c in chunks if c.id in stored and self._resized(stored[c.id].span)}
        spans = {name: stored[name].span for name in changed}
        spans |= self._compressed([c for c in chunks if c.id in missing | resized])
        if changed | resized:
            self.index.delete(chunk_ids=changed | resized)
        fresh = [i for i, chunk in enumerate(chunks) if chunk.id in spans]
        if fresh:
            self.index.add([chunks[i] for i in fresh], [spans[chunks[i].id] for i in fresh], vectors[fresh],
                           spec=self.compressor.spec)
        return len(missing | resized)

    def _resized(self, span: MemorySpan) -> bool:
        wanted = self.compression_factor
        return wanted is not None and span.num_slots != self.compressor.num_slots(span.num_source_tokens, wanted)

    def _compressed(self, chunks: list[Chunk]) -> dict[str, MemorySpan]:
        """Spans by chunk id; a text that several documents share is compressed once."""
        texts = {chunk.text: chunk for chunk in chunks}
        if not texts:
            return {}
        spans = self.compressor.compress(list(texts.values()), compression_factor=self.compression_factor)
        by_text = dict(zip(texts, spans, strict=True))
        return {chunk.id: replace(by_text[chunk.text], chunk_id=chunk.id) for chunk in chunks}


__all__ = ["SpanWriter"]
