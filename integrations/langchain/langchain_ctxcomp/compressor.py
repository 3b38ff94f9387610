"""SpanDocumentCompressor: gives documents of any retriever references to their spans."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Literal

from langchain_core.callbacks import Callbacks
from langchain_core.documents import BaseDocumentCompressor, Document
from langchain_core.runnables.config import run_in_executor
from pydantic import PrivateAttr

from ctxcomp_rag import CtxcompError, InputError, SpanChat, quoted
from langchain_ctxcomp.chunks import REFERENCE_KEY
from langchain_ctxcomp.minting import with_references
from langchain_ctxcomp.scope import current_scope
from langchain_ctxcomp.vector_store import SpanVectorStore

logger = logging.getLogger(__name__)


class SpanDocumentCompressor(BaseDocumentCompressor):
    """For `ContextualCompressionRetriever`, behind BM25, Chroma or any other retriever.

    Number, order, text and metadata of the documents stay. A document is known by its text.

    Args:
        chat: where spans are looked up and references are minted; the one that the model has.
        on_missing: what happens to a document without a span: it stays text, is compressed now, or an error is raised.
        on_error: what happens if that fails: the documents stay text, or the error is raised.
        store: needed to compress now; over the same index.
    """

    on_missing: Literal["text", "compress", "raise"] = "text"
    on_error: Literal["text", "raise"] = "text"
    _chat: SpanChat = PrivateAttr()
    _store: SpanVectorStore | None = PrivateAttr(default=None)

    def __init__(self, chat: SpanChat, *, store: SpanVectorStore | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
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
        try:
            made = with_references(documents, self._chat, scope)
            missing = [d for d in made if REFERENCE_KEY not in d.metadata and d.page_content.strip()]
            if missing and self.on_missing == "raise":
                raise InputError(f"expected a span for every document, but {len(missing)} have none, first "
                                 f"{missing[0].id!r}; add them to the index, or use on_missing='text'")
            if missing and self.on_missing == "compress":
                assert self._store is not None
                self._store.add_documents([d.model_copy(update={"id": None}) for d in missing])
                made = with_references(documents, self._chat, scope)
        except CtxcompError as error:
            if self.on_error == "raise" or self.on_missing == "raise":
                raise
            logger.warning("documents stay text: %s", error)
            return [_with_text(d.model_copy(update={"metadata": {k: v for k, v in d.metadata.items()
                                                                 if k != REFERENCE_KEY}})) for d in documents]
        return [_with_text(d) for d in made]


def _with_text(document: Document) -> Document:
    """A document without a span shows its text where the others show their reference, spelled so that it names none."""
    if REFERENCE_KEY in document.metadata:
        return document
    return document.model_copy(update={"metadata": {**document.metadata, REFERENCE_KEY: quoted(document.page_content)}})


__all__ = ["SpanDocumentCompressor"]
