"""One index of a few fictional documents, one decoder, shared by all tests of the distribution."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from li_setup import CORPUS, Setup

from ctxcomp_rag import CompressedRAG, Document, MemoryIndex, SpanChat
from llama_index_ctxcomp import EncoderEmbedding, SpanVectorStore


@pytest.fixture(scope="session")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setup]:
    rag = CompressedRAG.create(tmp_path_factory.mktemp("index") / "kb")
    rag.index([Document(d.id, d.text, {"kind": d.kind}) for d in CORPUS])
    with SpanChat(rag.backbone, rag.memory) as chat:
        yield Setup(rag, chat, EncoderEmbedding(rag.encoder))


@pytest.fixture
def empty(setup: Setup, tmp_path: Path) -> Iterator[SpanVectorStore]:
    """An empty store of vectors of 8 numbers."""
    with MemoryIndex.create(tmp_path / "kb", setup.compressor.spec, vector_size=8, retrieval_encoder="axes") as index:
        yield SpanVectorStore(index, setup.compressor)
