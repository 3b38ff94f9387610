"""Nearest neighbours by cosine similarity: FAISS behind one lock, and its snapshot on disk.

The snapshot only saves time. The vectors live in the span table; whatever is missing, torn or contradictory
here is made again from there.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ctxcomp_rag.index.folder import write_file

CURRENT = "CURRENT.json"
FLAT_MOST = 100_000
"""Vectors up to which search is exact."""
LISTS = 1024
_LISTS_READ = 64
_TRAINED_ON = 40  # vectors for each list, as FAISS asks for at least
_CANDIDATES = 4  # scored again for each that is asked for
_SAME = 0.95  # cosine similarity of a vector and its 8-bit code: 0.999 and above; of two different vectors: below this
Floats = NDArray[np.float32]
Ids = NDArray[np.int64]


def normalised(vectors: NDArray[Any]) -> Floats:
    """(n, d) -> (n, d) float32 rows of length 1, C-contiguous; the zero vector stays zero."""
    exact = np.asarray(vectors, dtype=np.float64)
    # scaled first, so that the squares of very large or very small numbers stay finite
    scale = np.abs(exact).max(axis=1, keepdims=True, initial=0.0)
    exact = exact / np.where(scale > 0, scale, 1.0)
    norms = np.linalg.norm(exact, axis=1, keepdims=True)
    return np.ascontiguousarray(exact / np.where(norms > 0, norms, 1.0), dtype=np.float32)


class VectorIndex:
    """Vectors of one size under int64 ids. Safe to use from several threads.

    Up to `FLAT_MOST` vectors lie side by side as they are, and search is exact. With more, they become 8-bit codes in
    1024 inverted lists (IVF, SQ8), of which a search reads some: it returns more candidates than were asked for, with
    approximate scores, and the caller scores them again from the stored vectors (see `best_of`).
    """

    def __init__(self, vector_size: int) -> None:
        import faiss

        self.vector_size = vector_size
        self._index: Any = faiss.IndexIDMap2(faiss.IndexFlatIP(vector_size))
        self._highest = -1
        # FAISS search is not safe beside add or remove: Flat returns wrong neighbours, HNSW crashes
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return int(self._index.ntotal)

    @property
    def exact(self) -> bool:
        """Whether search finds the very best and scores are cosine similarities to float32 precision."""
        return hasattr(self._index, "id_map")

    def ids(self) -> Ids:
        """(n,) int64, in no particular order."""
        with self._lock:
            return self._ids()

    def _ids(self) -> Ids:
        import faiss

        if self.exact:
            return np.array(faiss.vector_to_array(self._index.id_map), dtype=np.int64)
        lists = self._index.invlists
        parts = [faiss.rev_swig_ptr(lists.get_ids(i), lists.list_size(i)).copy()
                 for i in range(lists.nlist) if lists.list_size(i)]
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def add(self, ids: Ids, vectors: NDArray[Any]) -> None:
        """ids: (n,), vectors: (n, vector_size), any length. Ids already present are left alone.

        FAISS itself would take a second vector under the same id without a word.
        """
        with self._lock:
            fresh = ids > self._highest
            if not fresh.all():
                fresh = ~np.isin(ids, self._ids())
            if fresh.any():
                if self.exact and len(self) + int(fresh.sum()) > FLAT_MOST:
                    self._index = _coded(self._index, normalised(vectors[fresh]))
                self._index.add_with_ids(normalised(vectors[fresh]), np.ascontiguousarray(ids[fresh], dtype=np.int64))
                self._highest = max(self._highest, int(ids.max()))

    def remove(self, ids: Ids) -> int:
        """Number of vectors removed."""
        import faiss

        if not len(ids):
            return 0
        with self._lock:
            return int(self._index.remove_ids(faiss.IDSelectorBatch(np.ascontiguousarray(ids, dtype=np.int64))))

    def search(self, queries: NDArray[Any], top_k: int, *, among: Ids | None = None) -> list[tuple[Ids, Floats]]:
        """The best `min(top_k, len(among or all))` ids and cosine similarities per query, best first; not fewer, and
        where `exact` is false more, for `best_of`.

        queries: (q, vector_size). `among` restricts the candidates before the best are chosen.
        """
        import faiss

        rows = normalised(queries)
        with self._lock:
            enough = min(top_k, len(self) if among is None else len(among), len(self))
            if enough < 1:
                return [(np.empty(0, np.int64), np.empty(0, np.float32)) for _ in rows]
            selector = None if among is None else faiss.IDSelectorBatch(np.ascontiguousarray(among, dtype=np.int64))
            if self.exact:
                parameters = faiss.SearchParameters(sel=selector)  # type: ignore[call-arg]
                scores, ids = self._index.search(rows, enough, params=parameters)
            else:
                # a filter may leave few vectors, anywhere: then every list is read
                k = min(_CANDIDATES * top_k + _CANDIDATES, len(self))
                for lists in (_LISTS_READ, LISTS) if among is None else (LISTS,):
                    parameters = faiss.SearchParametersIVF(sel=selector, nprobe=lists)  # type: ignore[call-arg]
                    scores, ids = self._index.search(rows, k, params=parameters)
                    if (ids[:, enough - 1] >= 0).all():
                        break
        return [(i[i >= 0], s[i >= 0]) for i, s in zip(ids, scores, strict=True)]

    def vectors(self, ids: Ids) -> Floats:
        """(n, vector_size) normalised vectors, as exact as scores are; every id must be present."""
        with self._lock, _by_id(self._index):
            return np.asarray(self._index.reconstruct_batch(np.ascontiguousarray(ids, dtype=np.int64)))

    def agrees_with(self, stored: Iterable[tuple[Ids, NDArray[Any]]]) -> bool:
        """Whether the vectors under these ids, given in batches, are the given ones, up to the precision of codes."""
        with self._lock, _by_id(self._index):
            for ids, vectors in stored:
                held = np.asarray(self._index.reconstruct_batch(np.ascontiguousarray(ids, dtype=np.int64)))
                similarities = (normalised(held) * normalised(vectors)).sum(axis=1)
                if not (np.allclose(held, normalised(vectors), rtol=0, atol=1e-6) if self.exact
                        else (similarities > _SAME).all()):
                    return False
        return True

    def save(self, folder: Path, version: int) -> None:
        """Write the snapshot that belongs to `version` of the span table, then drop the older ones."""
        import faiss

        with self._lock:
            data = faiss.serialize_index(self._index).data
        name = f"faiss-{version}.bin"
        write_file(folder / name, data)
        current = {"version": version, "file": name, "sha256": hashlib.sha256(data).hexdigest()}
        write_file(folder / CURRENT, json.dumps(current).encode())
        for old in folder.glob("faiss-*.bin*"):
            if old.name != name:
                old.unlink(missing_ok=True)

    @classmethod
    def load(cls, folder: Path, vector_size: int) -> tuple[VectorIndex, int] | None:
        """The snapshot and its version, or None where there is none that can be trusted."""
        import faiss

        for _ in range(2):  # a writer may replace the snapshot between the two reads
            try:
                current = json.loads((folder / CURRENT).read_bytes())
                data = (folder / Path(current["file"]).name).read_bytes()
                version, digest = int(current["version"]), current["sha256"]
            except (OSError, ValueError, KeyError, TypeError):
                continue
            # FAISS detects a torn file, but not a flipped bit
            if hashlib.sha256(data).hexdigest() != digest:
                continue
            try:
                index = faiss.deserialize_index(np.frombuffer(data, dtype=np.uint8))
            except RuntimeError:
                return None
            kinds = (faiss.IndexIDMap2, faiss.IndexIVFScalarQuantizer)
            same_kind = isinstance(index, kinds) and index.metric_type == faiss.METRIC_INNER_PRODUCT
            if not same_kind or index.d != vector_size:
                return None
            loaded = cls(vector_size)
            loaded._index = index
            loaded._highest = int(loaded._ids().max(initial=-1))
            return loaded, version
        return None


def best_of(queries: NDArray[Any], candidates: Sequence[tuple[Ids, Floats]], ids: Ids, vectors: NDArray[Any],
            top_k: int) -> list[tuple[Ids, Floats]]:
    """The best `top_k` candidates of each query by exact cosine similarity, best first.

    queries: (q, vector_size). ids: (n,), vectors: (n, vector_size): what is stored; candidates without are dropped.
    """
    if not len(ids):
        return [(np.empty(0, np.int64), np.empty(0, np.float32)) for _ in candidates]
    order = np.argsort(ids)
    ids, rows = ids[order], normalised(vectors[order])
    best = []
    for query, (found, _) in zip(normalised(queries), candidates, strict=True):
        places = np.searchsorted(ids, np.intersect1d(found, ids))
        scores = rows[places] @ query
        chosen = np.argsort(-scores, kind="stable")[:top_k]
        best.append((ids[places[chosen]], scores[chosen]))
    return best


def _coded(flat: Any, more: Floats) -> Any:
    """The vectors of a flat index in inverted lists of 8-bit codes, trained on them and on those about to come."""
    import faiss

    plain: Any = faiss.downcast_index(flat.index)
    stored = np.empty((0, flat.d), np.float32)
    if flat.ntotal:
        stored = faiss.rev_swig_ptr(plain.get_xb(), flat.ntotal * flat.d).reshape(-1, flat.d)
    sample = np.concatenate([stored, more])
    if len(sample) > _TRAINED_ON * LISTS:
        sample = sample[np.random.default_rng(0).permutation(len(sample))[: _TRAINED_ON * LISTS]]
    index = faiss.IndexIVFScalarQuantizer(faiss.IndexFlatIP(flat.d), flat.d, LISTS,
                                          faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT)
    index.cp.niter = 10
    index.train(sample)
    if len(stored):
        index.add_with_ids(stored, faiss.vector_to_array(flat.id_map))
    return index


@contextmanager
def _by_id(index: Any) -> Iterator[None]:
    """While open, vectors can be looked up by id: an inverted file has no such table, and none is kept in memory."""
    import faiss

    if hasattr(index, "id_map"):
        yield
        return
    index.set_direct_map_type(faiss.DirectMap.Hashtable)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        index.set_direct_map_type(faiss.DirectMap.NoMap)  # type: ignore[attr-defined]
