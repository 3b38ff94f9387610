"""FAISS behind one lock: scores, ids, filters, and snapshots that are used only when they are whole."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctxcomp_rag.index.vectors import VectorIndex, normalised
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
