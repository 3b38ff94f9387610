"""SpanRetriever: what a SpanVectorStore retrieves, with references to the spans."""

from __future__ import annotations

from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForRetrieverRun, CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.runnables import RunnableConfig
from langchain_core.runnables.config import run_in_executor
from langchain_core.vectorstores import VectorStoreRetriever
from pydantic import PrivateAttr

from ctxcomp_rag import SpanChat
from langchain_ctxcomp.minting import OnError, with_references
from langchain_ctxcomp.scope import current_scope, scope_of


class SpanRetriever(VectorStoreRetriever):
    """A vector store's retriever that mints a reference for every document it returns.

    `page_content` stays the text; the reference is in `metadata["ctxcomp_ref"]`, for `SpanPrompt` and
    `SPAN_DOCUMENT_PROMPT`.

    Args:
        chat: whose references they are; without one, documents come back as the store has them.
        on_error: what happens if spans cannot be looked up: the documents stay text, or the error is raised.
    """

    on_error: OnError = "text"
    _chat: SpanChat | None = PrivateAttr(default=None)

    def __init__(self, *, chat: SpanChat | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._chat = chat

    def invoke(self, input: str, config: RunnableConfig | None = None, **kwargs: Any) -> list[Document]:
        with scope_of(config):
            return super().invoke(input, config, **kwargs)

    async def ainvoke(self, input: str, config: RunnableConfig | None = None, **kwargs: Any) -> list[Document]:
        with scope_of(config):
            return await super().ainvoke(input, config, **kwargs)

    def _get_relevant_documents(self, query: str, *, run_manager: CallbackManagerForRetrieverRun, **kwargs: Any
                                ) -> list[Document]:
        found = super()._get_relevant_documents(query, run_manager=run_manager, **kwargs)
        return (with_references(found, self._chat, current_scope(self._chat), self.on_error) if self._chat
                else found)

    async def _aget_relevant_documents(self, query: str, *, run_manager: AsyncCallbackManagerForRetrieverRun,
                                       **kwargs: Any) -> list[Document]:
        found = await super()._aget_relevant_documents(query, run_manager=run_manager, **kwargs)
        if self._chat is None:
            return found
        scope = current_scope(self._chat)
        return await run_in_executor(None, with_references, found, self._chat, scope, self.on_error)


__all__ = ["SpanRetriever"]
