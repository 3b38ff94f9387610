"""SpanVectorStore: a MemoryIndex as a LangChain vector store. Text, vector and span of a document live together."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.vectorstores import VectorStore
from langchain_core.vectorstores.utils import maximal_marginal_relevance

from ctxcomp_rag import Chunk, Compressor, InputError, MemoryIndex, SpanChat, load_frozen, load_trained_compressor
from langchain_ctxcomp.chunks import chunk_of, document_of, is_document
from langchain_ctxcomp.embeddings import embedding_name
from langchain_ctxcomp.retriever import SpanRetriever

_BATCH = 32  # documents per commit: a killed job loses at most these
Filter = dict[str, Any]


class SpanVectorStore(VectorStore):
    """Every commit is on the disk when a call returns; there is nothing to save.

    Filters are metadata keys to a value or a list of values, applied before the nearest are chosen. Scores are cosine
    similarities.

    Args:
        index: an open index; the object that the `SpanChat` has.
        embedding: what embeds documents and queries; the one the index was made with.
        compressor: needed to add; reading does without.
        chat: makes `as_retriever()` give references to spans along.
    """

    def __init__(self, index: MemoryIndex, embedding: Embeddings, compressor: Compressor | None = None, *,
                 chat: SpanChat | None = None) -> None:
        name = embedding_name(embedding)
        if index.retrieval_encoder != name:
            raise InputError(f"the index in {index.location!r} was made with the embeddings "
                             f"{index.retrieval_encoder!r}, got {name!r}; pass the ones it was made with")
        if compressor is not None:
            index.spec.require_compressor(compressor.spec)
        if chat is not None and chat.index is not index:
            raise InputError("expected a SpanChat over the same MemoryIndex object, got one over another; make both "
                             "from one index, so that they see the same deletions")
        self.index, self.embedding, self.compressor, self.chat = index, embedding, compressor, chat

    @property
    def embeddings(self) -> Embeddings:
        return self.embedding

    @classmethod
    def from_texts(cls, texts: list[str], embedding: Embeddings, metadatas: list[dict[str, Any]] | None = None, *,
                   ids: list[str] | None = None, path: str | Path | None = None, model: str | Path = "embedded",
                   compressor: str | Path = "icae", **kwargs: Any) -> Self:
        """A new index in the folder `path` with these texts.

        Args:
            model, compressor: as in `CompressedRAG.create`.
        """
        if path is None:
            raise InputError("a SpanVectorStore is a folder on disk; pass path=, a new folder for it")
        maker = load_trained_compressor(compressor, load_frozen(model))
        index = MemoryIndex.create(path, maker.spec, vector_size=len(embedding.embed_query("size")),
                                   retrieval_encoder=embedding_name(embedding))
        store = cls(index, embedding, maker)
        store.add_texts(texts, metadatas, ids=ids)
        return store

    # -- writing -----------------------------------------------------------------------------------------------------

    def add_texts(self, texts: Iterable[str], metadatas: list[dict[str, Any]] | None = None, *,
                  ids: list[str] | None = None, **kwargs: Any) -> list[str]:
        listed = list(texts)
        if metadatas is not None and len(metadatas) != len(listed):
            raise InputError(f"expected one metadata for each of {len(listed)} texts, got {len(metadatas)}")
        documents = [Document(t, metadata=m) for t, m in zip(listed, metadatas or [{}] * len(listed), strict=True)]
        return self.add_documents(documents, ids=ids)

    def add_documents(self, documents: list[Document], *, ids: list[str | None] | list[str] | None = None,
                      **kwargs: Any) -> list[str]:
        """Compress and store; an id that is there already is replaced, and what has not changed is not done again."""
        if self.compressor is None:
            raise InputError("this store was opened for reading; pass a compressor to add documents: "
                             "SpanVectorStore(index, embedding, compressor)")
        if ids is not None and len(ids) != len(documents):
            raise InputError(f"expected one id for each of {len(documents)} documents, got {len(ids)}")
        names = [name or d.id or str(uuid.uuid4()) for name, d in
                 zip(ids or [None] * len(documents), documents, strict=True)]
        count = self.compressor.backbone.tokenizer.encode
        latest = {name: chunk_of(d, name, lambda text: len(count(text))) for name, d in
                  zip(names, documents, strict=True)}
        chunks = list(latest.values())
        for start in range(0, len(chunks), _BATCH):
            self._commit(chunks[start : start + _BATCH], self.compressor)
        return names

    def _commit(self, chunks: Sequence[Chunk], compressor: Compressor) -> None:
        known = [c for c in chunks if c.id not in self.index.missing([c.id for c in chunks])]
        stored = {s.chunk.id: s for s in self.index.get([c.id for c in known])}
        changed = {c.id for c in known if dict(stored[c.id].chunk.metadata) != dict(c.metadata)}
        fresh = [c for c in chunks if c.id not in stored]
        spans = {c.id: s for c, s in zip(fresh, compressor.compress(fresh) if fresh else [], strict=True)}
        spans |= {name: stored[name].span for name in changed}
        if changed:
            self.index.delete(chunk_ids=changed)
        adding = [c for c in chunks if c.id in spans]
        if adding:
            vectors = np.asarray(self.embedding.embed_documents([c.text for c in adding]), np.float32)
            self.index.add(adding, [spans[c.id] for c in adding], vectors, spec=compressor.spec)
        # only now: a document is never gone in between
        outdated = {name for c in chunks for name in self.index.document_chunks(c.document_id)} - {c.id for c in chunks}
        if outdated:
            self.index.delete(chunk_ids=outdated)

    def delete(self, ids: list[str] | None = None, **kwargs: Any) -> bool:
        """Delete documents by id; unknown ids are passed over."""
        if ids is None:
            raise InputError("expected ids to delete, got none")
        chunks = [c.id for c in self._named(ids)]
        if chunks:
            self.index.delete(chunk_ids=chunks)
        return True

    # -- reading -----------------------------------------------------------------------------------------------------

    def get_by_ids(self, ids: Sequence[str], /) -> list[Document]:
        return [document_of(c) for c in self._named(ids)]

    def _named(self, ids: Sequence[str]) -> list[Chunk]:
        """Chunks of documents by id; a chunk that came without a LangChain document goes by its own."""
        wanted = [c for name in dict.fromkeys(ids) for c in self.index.document_chunks(name)]
        wanted += [name for name in dict.fromkeys(ids) if not self.index.missing([name])]
        found = [s.chunk for s in self.index.get(wanted)] if wanted else []
        return [c for c in found if (c.document_id if is_document(c) else c.id) in set(ids)]

    def similarity_search(self, query: str, k: int = 4, *, filter: Filter | None = None, **kwargs: Any
                          ) -> list[Document]:
        return [d for d, _ in self.similarity_search_with_score(query, k, filter=filter)]

    def similarity_search_with_score(self, query: str, k: int = 4, *, filter: Filter | None = None, **kwargs: Any
                                     ) -> list[tuple[Document, float]]:
        return self.similarity_search_with_score_by_vector(self.embedding.embed_query(query), k, filter=filter)

    def similarity_search_by_vector(self, embedding: list[float], k: int = 4, *, filter: Filter | None = None,
                                    **kwargs: Any) -> list[Document]:
        return [d for d, _ in self.similarity_search_with_score_by_vector(embedding, k, filter=filter)]

    def similarity_search_with_score_by_vector(self, embedding: list[float], k: int = 4, *,
                                               filter: Filter | None = None) -> list[tuple[Document, float]]:
        """Documents with their cosine similarity, best first."""
        return [(document_of(c), score) for c, score in self._nearest(embedding, k, filter)]

    def max_marginal_relevance_search(self, query: str, k: int = 4, fetch_k: int = 20, lambda_mult: float = 0.5, *,
                                      filter: Filter | None = None, **kwargs: Any) -> list[Document]:
        return self.max_marginal_relevance_search_by_vector(self.embedding.embed_query(query), k, fetch_k, lambda_mult,
                                                            filter=filter)

    def max_marginal_relevance_search_by_vector(self, embedding: list[float], k: int = 4, fetch_k: int = 20,
                                                lambda_mult: float = 0.5, *, filter: Filter | None = None,
                                                **kwargs: Any) -> list[Document]:
        chunks = [c for c, _ in self._nearest(embedding, max(k, fetch_k), filter)]
        if not chunks:
            return []
        vectors = self.index.vectors([c.id for c in chunks])
        chosen = maximal_marginal_relevance(np.asarray(embedding, np.float32), list(vectors), lambda_mult, k)
        return [document_of(chunks[i]) for i in chosen]

    def _nearest(self, vector: Sequence[float], k: int, filter: Filter | None) -> list[tuple[Chunk, float]]:
        if not len(self.index):
            return []
        return self.index.search_chunks(np.asarray(vector, np.float32), k, where=filter)[0]

    def _select_relevance_score_fn(self) -> Callable[[float], float]:
        return lambda similarity: min(1.0, max(0.0, (1 + similarity) / 2))

    def as_retriever(self, **kwargs: Any) -> SpanRetriever:
        """A retriever whose documents carry references to their spans; plain ones where the store has no `chat`."""
        tags = [*(kwargs.pop("tags", None) or []), *self._get_retriever_tags()]
        return SpanRetriever(vectorstore=self, tags=tags, chat=kwargs.pop("chat", self.chat), **kwargs)


__all__ = ["SpanVectorStore"]
