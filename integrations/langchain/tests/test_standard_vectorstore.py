"""LangChain's own tests of a vector store, a retriever and embeddings."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from langchain_core.embeddings import Embeddings
from langchain_core.retrievers import BaseRetriever
from langchain_core.vectorstores import VectorStore
from langchain_tests.integration_tests import (
    EmbeddingsIntegrationTests,
    RetrieversIntegrationTests,
    VectorStoreIntegrationTests,
)
from langchain_tests.unit_tests import EmbeddingsUnitTests
from lc_setup import QUESTIONS, Setup

from ctxcomp_rag import MemoryIndex
from langchain_ctxcomp import EncoderEmbeddings, SpanRetriever, SpanVectorStore
from langchain_ctxcomp.embeddings import embedding_name


class TestVectorStore(VectorStoreIntegrationTests):
    @pytest.fixture
    def vectorstore(self, setup: Setup, folder: Path) -> Iterator[VectorStore]:  # type: ignore[override]
        embedding = self.get_embeddings()
        with MemoryIndex.create(folder, setup.compressor.spec, vector_size=len(embedding.embed_query("x")),
                                retrieval_encoder=embedding_name(embedding)) as index:
            yield SpanVectorStore(index, embedding, setup.compressor)


class TestRetriever(RetrieversIntegrationTests):
    @pytest.fixture(autouse=True)
    def _name_the_store(self, setup: Setup) -> None:
        type(self).setup_ = setup  # type: ignore[attr-defined]

    @property
    def retriever_constructor(self) -> type[BaseRetriever]:
        def make(k: int = 4) -> SpanRetriever:
            setup: Setup = type(self).setup_  # type: ignore[attr-defined]
            return setup.store.as_retriever(search_kwargs={"k": k})

        return make  # type: ignore[return-value]

    @property
    def retriever_constructor_params(self) -> dict[str, Any]:
        return {}

    @property
    def retriever_query_example(self) -> str:
        return QUESTIONS[0]


class TestEmbeddingsUnit(EmbeddingsUnitTests):
    @property
    def embeddings_class(self) -> type[Embeddings]:
        return EncoderEmbeddings


class TestEmbeddings(EmbeddingsIntegrationTests):
    @property
    def embeddings_class(self) -> type[Embeddings]:
        return EncoderEmbeddings
