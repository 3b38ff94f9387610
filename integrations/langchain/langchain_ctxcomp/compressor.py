"""SpanDocumentCompressor: gives documents of any retriever references to their spans."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Literal

from langchain_core.callbacks import Callbacks
from langchain_core.documents import BaseDocumentCompressor, Document
from langchain_core.runnables.config import run_in_executor
from pydantic import PrivateAttr

from ctxcomp_rag import CtxcompError, InputError, SpanChat
from langchain_ctxcomp.minting import OnError, with_references, without_span
from langchain_ctxcomp.scope import current_scope
from langchain_ctxcomp.vector_store import SpanVectorStore

logger = logging.getLogger(__name__)


class SpanDocumentCompressor(BaseDocumentCompressor):
    """For `ContextualCompressionRetriever`, behind BM25, Chroma or any other retriever.

    Number, order, text and metadata of the documents stay. A document is known by its text.

    Args:
        chat: where spans are looked up and references are minted; the one that the model has.
        on_missing: what happens to a document without a span: it stays text, is compressed now, or an error is raised.
        on_error: what happens to a document whose span cannot be looked up or made (also where the embeddings fail):
            it stays text and the error is logged, or the error is raised.
        store: needed to compress now; over the same index.
    """

    on_missing: Literal["text", "compress", "raise"] = "text"
    on_error: OnError = "text"
    _chat: SpanChat = PrivateAttr()
    _store: SpanVectorStore | None = PrivateAttr(default=None)

    def __init__(self, chat: SpanChat, *, store: SpanVectorStore | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        SpanChat.require(chat)
        if self.on_missing == "compress" and (store is None or store.compressor is None):
            raise InputError("on_missing='compress' needs a store with a compressor; pass store=SpanVectorStore(index, "
                             "embedding, compressor), or use on_missing='text'")
        if store is not None and store.index is not chat.index:
            raise InputError("expected a store over the index of the SpanChat, got one over another index")
        self._chat, self._store = chat, store

    def compress_documents(self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
                           ) -> list[Document]:
        return self._compress(documents, current_scope(self._chat))

    async def acompress_documents(self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
                                  ) -> list[Document]:
        return await run_in_executor(None, self._compress, documents, current_scope(self._chat))

    def _compress(self, documents: Sequence[Document], scope: str) -> list[Document]:
        if self.on_missing != "text":
            try:
                missing = [documents[i] for i in without_span(documents, self._chat)]
            except CtxcompError as error:
                self._failed(error)
            else:
                self._supply(missing)
        return with_references(documents, self._chat, scope, self.on_error)

    def _supply(self, missing: list[Document]) -> None:
        if missing and self.on_missing == "raise":
            raise InputError(f"expected a span for every document, but {len(missing)} have none, first "
                             f"{missing[0].id!r}; add them to the index, or use on_missing='text'")
        try:
            self._add(missing)
        except Exception as error:
            if self.on_error == "raise" or len(missing) == 1:
                self._failed(error)
                return
            for document in missing:  # one that cannot be compressed must not take the others with it
                self._supply([document])

    def _add(self, missing: list[Document]) -> None:
        assert self._store is not None
        if missing:
            self._store.add_documents([d.model_copy(update={"id": None}) for d in missing])

    def _failed(self, error: Exception) -> None:
        """Also what the embeddings of others raise: a document must not be lost because a service is down."""
        if "raise" in (self.on_error, self.on_missing):
            raise error
        logger.warning("documents stay text: %s", error)


__all__ = ["SpanDocumentCompressor"]
