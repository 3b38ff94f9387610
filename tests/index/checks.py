"""What the tests of the index compare: spans bit for bit, an index with what was put into it."""

from __future__ import annotations

import math
from dataclasses import fields

import numpy as np
import torch

from ctxcomp_rag.index import MemoryIndex
from ctxcomp_rag.spans import MemorySpan
from tests.index.conftest import VECTOR_SIZE, Corpus, cosine

QUERIES = np.random.default_rng(99).standard_normal((3, VECTOR_SIZE)).astype(np.float32)


def same_span(a: MemorySpan, b: MemorySpan) -> bool:
    """Equal in every field, tensors in dtype, shape and every bit."""
    for field in fields(a):
        x, y = getattr(a, field.name), getattr(b, field.name, None)
        if isinstance(x, torch.Tensor):
            if not isinstance(y, torch.Tensor) or (x.dtype, x.shape) != (y.dtype, y.shape):
                return False
            if not torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8)):
                return False
        elif x != y:
            return False
    return type(a) is type(b)


def assert_same_span(a: MemorySpan, b: MemorySpan) -> None:
    assert same_span(a, b), f"{a} is not {b}"


def assert_holds(index: MemoryIndex, corpus: Corpus, part: slice = slice(None)) -> None:
    """The index holds exactly these chunks: spans bit for bit, scores as NumPy computes them, FAISS ids = row ids."""
    chunks, spans, vectors = corpus.chunks[part], corpus.spans[part], corpus.vectors[part]
    assert sorted(c.id for c in index.chunks()) == sorted(c.id for c in chunks)
    assert sorted(index._vectors.ids().tolist()) == sorted(index._table.rows.values())
    assert index._table.count_rows() == len(chunks)
    for found, chunk, span in zip(index.get([c.id for c in chunks]), chunks, spans, strict=True):
        assert found.chunk == chunk
        assert math.isnan(found.score)
        assert_same_span(found.span, span)
    for hits, expected in zip(index.search(QUERIES, len(chunks) + 1), cosine(QUERIES, vectors), strict=True):
        place = {c.id: i for i, c in enumerate(chunks)}
        np.testing.assert_allclose([h.score for h in hits], np.sort(expected)[::-1], atol=1e-6)
        np.testing.assert_allclose([expected[place[h.chunk.id]] for h in hits], np.sort(expected)[::-1], atol=1e-6)
    seen: list[tuple[int, int]] = []
    report = index.verify(progress=lambda *counts: seen.append(counts))
    assert not seen or seen[-1] == (len(chunks), len(chunks))
    assert (report.ok, report.notes, report.chunks) == (True, [], len(chunks))
