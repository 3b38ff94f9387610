"""A keyword retriever that is not ours: it knows nothing of spans."""

from __future__ import annotations

from typing import Any

from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever


class KeywordRetriever(BaseRetriever):
    """Documents that share a word with the query, those that share most first."""

    documents: list[Document]

    def _get_relevant_documents(self, query: str, *, run_manager: CallbackManagerForRetrieverRun, **_: Any
                                ) -> list[Document]:
        words = set(query.lower().split())
        shared = [(len(words & set(d.page_content.lower().split())), d) for d in self.documents]
        return [d for n, d in sorted(shared, key=lambda pair: -pair[0]) if n]
