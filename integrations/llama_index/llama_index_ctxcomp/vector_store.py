"""SpanVectorStore: a MemoryIndex as a vector store. Text, vector and span of a node live and die together."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from llama_index.core.bridge.pydantic import PrivateAttr
from llama_index.core.schema import BaseNode
from llama_index.core.vector_stores.types import (
    DEFAULT_PERSIST_DIR,
    DEFAULT_PERSIST_FNAME,
    BasePydanticVectorStore,
    MetadataFilters,
    VectorStoreQuery,
    VectorStoreQueryMode,
    VectorStoreQueryResult,
)

from ctxcomp_rag import Chunk, Compressor, InputError, MemoryIndex
from llama_index_ctxcomp.chunks import NODE_ID, chunk_id, node_of
from llama_index_ctxcomp.filters import equalities, matches
from llama_index_ctxcomp.writer import SpanWriter

_POINTER = "ctxcomp_index"


class SpanVectorStore(BasePydanticVectorStore):
    """Every commit is on the disk when a call returns; there is nothing to save.

    A node is known by its document, place and text, and by its id: adding it again replaces it, without compressing
    the same text twice. Ids belong to the nodes and are never given to others. Similarities are cosines.

    Args:
        index: give the same object to `SpanChat`, so that both see a deletion at once.
        compressor: needed to add; reading does without.
    """

    stores_text: bool = True
    is_embedding_query: bool = True
    _index: MemoryIndex = PrivateAttr()
    _writer: SpanWriter | None = PrivateAttr(default=None)

    def __init__(self, index: MemoryIndex, compressor: Compressor | None = None) -> None:
        super().__init__(stores_text=True)
        self._index = index
        self._writer = SpanWriter(index, compressor) if compressor is not None else None

    @classmethod
    def class_name(cls) -> str:
        return "SpanVectorStore"

    @property
    def client(self) -> MemoryIndex:
        """The index."""
        return self._index

    def add(self, nodes: Sequence[BaseNode], **kwargs: Any) -> list[str]:
        if self._writer is None:
            raise InputError("this store was opened for reading; pass a compressor to add nodes: "
                             "SpanVectorStore(index, compressor)")
        new = {node.node_id: chunk_id(node) for node in nodes}
        outdated = {c.id for c in self._named(list(new)) if c.id != new[node_of(c).node_id]}
        self._writer.write(nodes)
        if outdated - set(new.values()):  # only now: a node is never gone in between
            self._index.delete(chunk_ids=outdated - set(new.values()))
        return [node.node_id for node in nodes]

    def delete(self, ref_doc_id: str, **delete_kwargs: Any) -> None:
        self._index.delete(document_ids=[ref_doc_id])

    def delete_nodes(self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None,
                     **delete_kwargs: Any) -> None:
        if node_ids is None and filters is None:
            raise InputError("expected node_ids or filters to delete, got neither; clear() deletes all nodes")
        self._index.delete(chunk_ids=[chunk.id for chunk, _ in self._select(node_ids, filters)])

    def clear(self) -> None:
        self._index.delete(chunk_ids=[chunk.id for chunk in self._index.chunks()])

    def get_nodes(self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None) -> list[BaseNode]:
        """Nodes by id, in that order, or all that pass the filters; unknown ids are left out."""
        nodes = [node for _, node in self._select(node_ids, filters)]
        if node_ids is not None:
            by_id = {node.node_id: node for node in nodes}
            nodes = [by_id[name] for name in dict.fromkeys(node_ids) if name in by_id]
        return nodes

    def query(self, query: VectorStoreQuery, **kwargs: Any) -> VectorStoreQueryResult:
        """The nearest nodes among those that pass the filters, best first."""
        if query.mode != VectorStoreQueryMode.DEFAULT:
            raise InputError(f"this store searches by vector only, it has no mode {query.mode.value!r}; use "
                             "vector_store_query_mode='default'")
        if query.query_embedding is None:
            raise InputError("expected a query with an embedding, got none; ask a question that is not empty (a chat "
                             "engine may condense one to nothing), or give the retriever an embed_model")
        where: dict[str, Any] = equalities(query.filters)
        if query.doc_ids:
            where["document_id"] = query.doc_ids
        wanted, vector = query.similarity_top_k, np.asarray(query.query_embedding, np.float32)
        allowed = set(query.node_ids or ())  # an index over a store of text says [] and means all
        depth, found, exhausted = wanted, list[tuple[BaseNode, float]](), not len(self._index)
        while len(found) < wanted and not exhausted:  # most filters are applied behind the search: look deeper
            hits = self._index.search_chunks(vector, depth, where=where or None)[0]
            nodes = [(node_of(chunk), score) for chunk, score in hits]
            found = [(n, s) for n, s in nodes
                     if matches(n, query.filters) and (not allowed or n.node_id in allowed)]
            exhausted, depth = len(hits) < depth, 4 * depth
        found = found[:wanted]
        return VectorStoreQueryResult(nodes=[n for n, _ in found], similarities=[s for _, s in found],
                                      ids=[n.node_id for n, _ in found])

    def persist(self, persist_path: str, fs: Any | None = None) -> None:
        """Note where the index is: the nodes are on the disk already."""
        path = _local(persist_path, fs)
        path.parent.mkdir(parents=True, exist_ok=True)
        where = self._index.location
        if not _is_uri(where):
            where = os.path.relpath(self._index.path, path.parent.absolute())
        path.write_text(json.dumps({_POINTER: where}), encoding="utf-8")

    @classmethod
    def from_persist_path(cls, persist_path: str, fs: Any | None = None,
                          compressor: Compressor | None = None) -> Self:
        """Open what `persist` noted."""
        path = _local(persist_path, fs)
        try:
            where = str(json.loads(path.read_text(encoding="utf-8"))[_POINTER])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"expected the note that SpanVectorStore.persist writes at {persist_path!r}, got: "
                             f"{type(error).__name__}; open the index with MemoryIndex.open(folder)") from error
        return cls(MemoryIndex.open(where if _is_uri(where) else path.parent / where), compressor)

    @classmethod
    def from_persist_dir(cls, persist_dir: str = DEFAULT_PERSIST_DIR, namespace: str = "default",
                         fs: Any | None = None, compressor: Compressor | None = None) -> Self:
        """Open what `StorageContext.persist(persist_dir)` noted."""
        return cls.from_persist_path(str(Path(persist_dir) / f"{namespace}__{DEFAULT_PERSIST_FNAME}"), fs, compressor)

    async def async_add(self, nodes: Sequence[BaseNode], **kwargs: Any) -> list[str]:
        return await asyncio.to_thread(self.add, nodes, **kwargs)

    async def adelete(self, ref_doc_id: str, **delete_kwargs: Any) -> None:
        await asyncio.to_thread(self.delete, ref_doc_id, **delete_kwargs)

    async def adelete_nodes(self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None,
                            **delete_kwargs: Any) -> None:
        await asyncio.to_thread(self.delete_nodes, node_ids, filters, **delete_kwargs)

    async def aclear(self) -> None:
        await asyncio.to_thread(self.clear)

    async def aget_nodes(self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None
                         ) -> list[BaseNode]:
        return await asyncio.to_thread(self.get_nodes, node_ids, filters)

    async def aquery(self, query: VectorStoreQuery, **kwargs: Any) -> VectorStoreQueryResult:
        return await asyncio.to_thread(self.query, query, **kwargs)

    def _select(self, node_ids: list[str] | None, filters: MetadataFilters | None) -> list[tuple[Chunk, BaseNode]]:
        chunks = self._named(node_ids) if node_ids is not None else list(self._index.chunks())
        nodes = [(chunk, node_of(chunk)) for chunk in chunks]
        return [(chunk, node) for chunk, node in nodes
                if matches(node, filters) and (node_ids is None or node.node_id in node_ids)]

    def _named(self, node_ids: list[str]) -> list[Chunk]:
        """Chunks of nodes by id; a chunk that came without a node goes by its own id."""
        if not len(self._index) or not node_ids:
            return []
        # any vector will do: the condition decides, and all that match are asked for
        anything = np.ones(self._index.vector_size, np.float32)
        found = self._index.search_chunks(anything, len(self._index), where={NODE_ID: list(node_ids)})[0]
        own = sorted(set(node_ids) - self._index.missing(node_ids) - {chunk.id for chunk, _ in found})
        return [chunk for chunk, _ in found] + [s.chunk for s in self._index.get(own)]


def _is_uri(where: str) -> bool:
    return "://" in where


def _local(path: str, fs: Any | None) -> Path:
    if fs is not None and "file" not in (fs.protocol if isinstance(fs.protocol, tuple | list) else (fs.protocol,)):
        raise InputError(f"expected a path on this machine, got the file system {fs.protocol!r}; an index is a local "
                         "folder")
    return Path(path)


__all__ = ["SpanVectorStore"]
