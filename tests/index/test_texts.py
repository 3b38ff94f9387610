"""Which chunk has a text: the same answer as comparing all texts, and no text is read twice."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ctxcomp_rag.index import MemoryIndex
from tests.index.conftest import SOFT, VECTOR_SIZE, Corpus, make_corpus, soft_span


@pytest.fixture
def index(tmp_path: Path) -> MemoryIndex:
    return MemoryIndex.create(tmp_path / "kb", SOFT, vector_size=VECTOR_SIZE, retrieval_encoder="random")


def test_every_text_is_found_and_no_other(index: MemoryIndex) -> None:
    corpus = make_corpus(40)
    assert index.chunks_of_texts(["nothing yet"]) == [None]
    corpus.add_to(index)
    texts = [c.text for c in corpus.chunks]
    assert index.chunks_of_texts([*texts, "", texts[0] + " ", texts[0][:-1], "\ud800"]) == [*corpus.ids, *[None] * 4]
    assert index.chunks_of_texts([]) == []


def test_deleted_texts_are_gone_and_added_ones_are_there(index: MemoryIndex) -> None:
    corpus = make_corpus(9)
    corpus.add_to(index, slice(0, 6))
    texts = [c.text for c in corpus.chunks]
    index.chunks_of_texts(texts)
    index.delete(chunk_ids=corpus.ids[:3])
    corpus.add_to(index, slice(6, 9))
    assert index.chunks_of_texts(texts) == [*[None] * 3, *corpus.ids[3:]]
    corpus.add_to(index, slice(0, 3))
    index.compact()
    assert index.chunks_of_texts(texts) == corpus.ids


def test_of_several_chunks_with_one_text_the_oldest_that_is_left_is_meant(index: MemoryIndex) -> None:
    first = make_corpus(1).chunks[0]
    chunks = [replace(first, document_id=name) for name in ("a", "b", "c")]
    twins = Corpus(chunks, [soft_span(c) for c in chunks], np.eye(3, VECTOR_SIZE, dtype=np.float32))
    twins.add_to(index)
    for chunk in chunks:
        assert index.chunks_of_texts([first.text]) == [chunk.id]
        index.delete(chunk_ids=[chunk.id])
    assert index.chunks_of_texts([first.text]) == [None]


def test_no_text_is_read_twice(index: MemoryIndex) -> None:
    corpus = make_corpus(30)
    read = []
    for part in (slice(0, 20), slice(20, 21), slice(21, 30)):
        corpus.add_to(index, part)
        index.chunks_of_texts(["x"])
        index.chunks_of_texts(["y"])
        read.append(index._texts.read)
    index.delete(chunk_ids=corpus.ids[:10])
    index.compact()
    index.chunks_of_texts(["z"])
    assert [*read, index._texts.read] == [20, 21, 30, 30]


def test_a_reader_follows_what_others_commit_once_it_refreshes(index: MemoryIndex) -> None:
    corpus = make_corpus(4)
    corpus.add_to(index, slice(0, 2))
    texts = [c.text for c in corpus.chunks]
    with MemoryIndex.open(index.path, read_only=True) as reader:
        assert reader.chunks_of_texts(texts) == [*corpus.ids[:2], None, None]
        corpus.add_to(index, slice(2, 4))
        index.delete(chunk_ids=corpus.ids[:1])
        assert reader.chunks_of_texts(texts) == [*corpus.ids[:2], None, None]
        reader.refresh()
        assert reader.chunks_of_texts(texts) == [None, *corpus.ids[1:]]
