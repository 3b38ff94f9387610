"""Nearest neighbours by cosine similarity: FAISS behind one lock, and its snapshot on disk.

The snapshot only saves time. The vectors live in the span table; whatever is missing, torn or contradictory
here is made again from there.
"""

from __future__ import annotations

import hashlib
import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ctxcomp_rag.index.folder import write_file

CURRENT = "CURRENT.json"
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
    """Vectors of one size under int64 ids; exact search. Safe to use from several threads."""

    def __init__(self, vector_size: int) -> None:
        import faiss

        self.vector_size = vector_size
        self._index: Any = faiss.IndexIDMap2(faiss.IndexFlatIP(vector_size))
        # FAISS search is not safe beside add or remove: Flat returns wrong neighbours, HNSW crashes
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return int(self._index.ntotal)

    def ids(self) -> Ids:
        """(n,) int64, in no particular order."""
        import faiss

        with self._lock:
            return np.array(faiss.vector_to_array(self._index.id_map), dtype=np.int64)

    def add(self, ids: Ids, vectors: NDArray[Any]) -> None:
        """ids: (n,), vectors: (n, vector_size), any length. Ids already present are left alone.

        FAISS itself would take a second vector under the same id without a word.
        """
        fresh = ~np.isin(ids, self.ids())
        if fresh.any():
            rows = normalised(vectors[fresh])
            with self._lock:
                self._index.add_with_ids(rows, np.ascontiguousarray(ids[fresh], dtype=np.int64))

    def remove(self, ids: Ids) -> int:
        """Number of vectors removed."""
        import faiss

        if not len(ids):
            return 0
        with self._lock:
            return int(self._index.remove_ids(faiss.IDSelectorBatch(np.ascontiguousarray(ids, dtype=np.int64))))

    def search(self, queries: NDArray[Any], top_k: int, *, among: Ids | None = None) -> list[tuple[Ids, Floats]]:
        """The best `min(top_k, len(among or all))` ids and cosine similarities per query, best first.

        queries: (q, vector_size). `among` restricts the candidates before the best are chosen.
        """
        import faiss

        rows = normalised(queries)
        with self._lock:
            size = len(self) if among is None else len(among)
            k = min(top_k, size, len(self))
            if k < 1:
                return [(np.empty(0, np.int64), np.empty(0, np.float32)) for _ in rows]
            parameters = None
            if among is not None:
                selector = faiss.IDSelectorBatch(np.ascontiguousarray(among, dtype=np.int64))
                parameters = faiss.SearchParameters(sel=selector)  # type: ignore[call-arg]
            scores, ids = self._index.search(rows, k, params=parameters)
        return [(i[i >= 0], s[i >= 0]) for i, s in zip(ids, scores, strict=True)]

    def vectors(self, ids: Ids) -> Floats:
        """(n, vector_size) normalised vectors; every id must be present."""
        with self._lock:
            return np.asarray(self._index.reconstruct_batch(np.ascontiguousarray(ids, dtype=np.int64)))

    def save(self, folder: Path, version: int) -> None:
        """Write the snapshot that belongs to `version` of the span table, then drop the older ones."""
        import faiss

        with self._lock:
            data = faiss.serialize_index(self._index).tobytes()
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
            same_kind = isinstance(index, faiss.IndexIDMap2) and index.metric_type == faiss.METRIC_INNER_PRODUCT
            if not same_kind or index.d != vector_size:
                return None
            loaded = cls(vector_size)
            loaded._index = index
            return loaded, version
        return None
