"""One index and one server for the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ctxcomp_rag import CompressedRAG, Document
from tests.serving.served import Served, serving
from tests.tiny_models import LetterCounts, save_tiny

DOCUMENTS = [
    Document("varn", "The lighthouse of Varn was built in 1871. It is 31 metres high and its stairs are red."),
    Document("brel", "Brel is a village of potters. Every spring its market sells blue bowls and nothing else."),
    Document("osk", "The river Osk freezes in January, so the ferry to Osk rests until the first of March."),
]


@pytest.fixture(scope="session")
def rag(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CompressedRAG]:
    """KV spans for a tiny decoder."""
    model = save_tiny("llama", tmp_path_factory.mktemp("model"))
    with CompressedRAG.create(tmp_path_factory.mktemp("kv") / "kb", model=model, compressor="infinipot",
                              encoder=LetterCounts()) as made:
        made.index(DOCUMENTS)
        yield made


@pytest.fixture(scope="session")
def served(rag: CompressedRAG) -> Iterator[Served]:
    with serving(rag) as made:
        yield made
