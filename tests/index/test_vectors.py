"""FAISS behind one lock: scores, ids, filters, and snapshots that are used only when they are whole."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctxcomp_rag.index.vectors import VectorIndex, best_of, normalised
from tests.index.conftest import cosine, flip_byte


def filled(count: int = 20, size: int = 6, seed: int = 0) -> tuple[VectorIndex, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    ids = rng.permutation(1000)[:count].astype(np.int64)
    vectors = rng.standard_normal((count, size)) * rng.uniform(0.01, 100, (count, 1))
    index = VectorIndex(size)
    index.add(ids, vectors)
    return index, ids, vectors


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), count=st.integers(1, 60), top_k=st.integers(1, 70), queries=st.integers(1, 4),
       keep=st.floats(0, 1), removed=st.floats(0, 1))
def test_search_equals_numpy(seed: int, count: int, top_k: int, queries: int, keep: float, removed: float) -> None:
    index, ids, vectors = filled(count, seed=seed)
    rng = np.random.default_rng(seed + 1)
    gone = rng.random(count) < removed
    assert index.remove(ids[gone]) == gone.sum()
    among = ids[rng.random(count) < keep]
    asked = rng.standard_normal((queries, 6))
    expected = cosine(asked, vectors)
    for restriction in (None, among):
        allowed = ~gone if restriction is None else ~gone & np.isin(ids, among)
        for row, (found, scores) in zip(expected, index.search(asked, top_k, among=restriction), strict=True):
            best = np.sort(row[allowed])[::-1][:top_k]
            np.testing.assert_allclose(scores, best, atol=1e-6)
            np.testing.assert_allclose([row[ids == i][0] for i in found], best, atol=1e-6)


def test_an_id_is_never_stored_twice() -> None:
    index, ids, vectors = filled()
    index.add(ids, -vectors)
    assert len(index) == 20
    assert sorted(index.ids()) == sorted(ids)
    np.testing.assert_allclose(index.vectors(ids), normalised(vectors), atol=1e-7)


def test_the_length_of_a_vector_does_not_matter() -> None:
    tiny, huge = np.array([[1e-30, 2e-30]]), np.array([[3e200, 4e200]])
    np.testing.assert_allclose(normalised(tiny), [[1 / 5**0.5, 2 / 5**0.5]], rtol=1e-6)
    np.testing.assert_allclose(normalised(huge), [[0.6, 0.8]], rtol=1e-6)
    assert normalised(np.zeros((1, 2))).tolist() == [[0.0, 0.0]]


def test_snapshot_gives_the_same_results(tmp_path: Path) -> None:
    index, ids, vectors = filled()
    index.save(tmp_path, 7)
    loaded = VectorIndex.load(tmp_path, 6)
    assert loaded is not None
    again, version = loaded
    assert version == 7
    for (a, s), (b, t) in zip(index.search(vectors, 5), again.search(vectors, 5), strict=True):
        assert a.tolist() == b.tolist()
        assert s.tolist() == t.tolist()
    again.remove(ids[:3])  # it is a working index, not a picture of one
    assert len(again) == 17


def test_a_new_snapshot_replaces_the_old_one(tmp_path: Path) -> None:
    index, _, _ = filled()
    index.save(tmp_path, 1)
    index.save(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["CURRENT.json", "faiss-2.bin"]
    assert json.loads((tmp_path / "CURRENT.json").read_text())["version"] == 2


@pytest.mark.parametrize("harm", ["no current", "torn current", "no file", "torn file", "flipped bit", "other size"])
def test_a_snapshot_that_is_not_whole_is_not_used(tmp_path: Path, harm: str) -> None:
    index, _, _ = filled()
    index.save(tmp_path, 3)
    current, file = tmp_path / "CURRENT.json", tmp_path / "faiss-3.bin"
    if harm == "no current":
        current.unlink()
    elif harm == "torn current":
        current.write_bytes(current.read_bytes()[:20])
    elif harm == "no file":
        file.unlink()
    elif harm == "torn file":
        file.write_bytes(file.read_bytes()[:-30])
    elif harm == "flipped bit":
        flip_byte(file, 200)
    assert VectorIndex.load(tmp_path, 7 if harm == "other size" else 6) is None


# ---- codes in inverted lists, for many vectors -----------------------------------------------------------------


@pytest.fixture
def few_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctxcomp_rag.index.vectors.FLAT_MOST", 200)
    monkeypatch.setattr("ctxcomp_rag.index.vectors.LISTS", 4)


@pytest.mark.usefixtures("few_are_many")
@pytest.mark.parametrize("in_parts", [True, False])
def test_candidates_scored_again_are_the_best_with_their_exact_scores(in_parts: bool) -> None:
    rng = np.random.default_rng(5)
    ids, vectors = rng.permutation(5000)[:600].astype(np.int64), rng.standard_normal((600, 6))
    index = VectorIndex(6)
    for part in np.split(np.arange(600), 6) if in_parts else [np.arange(600)]:
        index.add(ids[part], vectors[part])
    assert not index.exact
    index.add(ids[:50], -vectors[:50])  # known already
    assert index.remove(ids[:100]) == 100
    assert sorted(index.ids()) == sorted(ids[100:])
    asked = rng.standard_normal((3, 6))
    expected = cosine(asked, vectors[100:])
    for among in (None, ids[100:103], ids[200:400]):
        allowed = np.ones(500, bool) if among is None else np.isin(ids[100:], among)
        for top_k in (1, 10, 1000):
            found = best_of(asked, index.search(asked, top_k, among=among), ids, vectors, top_k)
            for row, (hits, scores) in zip(expected, found, strict=True):
                np.testing.assert_allclose(scores, np.sort(row[allowed])[::-1][:top_k], atol=1e-6)
                np.testing.assert_allclose([row[ids[100:] == i][0] for i in hits], scores, atol=1e-6)
    assert best_of(asked, index.search(asked, 5, among=ids[:0]), ids[:0], np.empty((0, 1)), 5)[0][0].tolist() == []


@pytest.mark.usefixtures("few_are_many")
def test_codes_are_saved_loaded_and_compared_with_what_is_stored(tmp_path: Path) -> None:
    rng = np.random.default_rng(6)
    ids, vectors = np.arange(300), rng.standard_normal((300, 6))
    index = VectorIndex(6)
    index.add(ids, vectors)
    index.save(tmp_path, 1)
    loaded = VectorIndex.load(tmp_path, 6)
    assert loaded is not None
    again = loaded[0]
    assert again.agrees_with([(ids[:100], vectors[:100]), (ids[100:], 3 * vectors[100:])])
    assert not again.agrees_with([(ids[:100], vectors[:100]), (ids[100:], vectors[100:][::-1])])
    again.add(np.array([7, 300]), vectors[:2])
    assert len(again) == 301
    similarities = (normalised(again.vectors(ids)) * normalised(vectors)).sum(axis=1)
    assert 0.95 < similarities.min() < 1
