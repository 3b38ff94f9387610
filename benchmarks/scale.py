"""An index of many small chunks: ingest, open, search and take, memory, bytes per chunk, delete, compact.

Random data: texts of 24 words, spans of `--slots` slots of `--hidden` float16 channels, vectors around 5,000 centres
(real embeddings form clusters too, but others) and, for the worst case of an inverted file, vectors without any
structure. Recall is counted against all vectors, compared one by one. Times are those of this machine, as busy as it
was; the result says how busy.

    python benchmarks/scale.py --chunks 100000
    python benchmarks/scale.py --chunks 1000000
    python benchmarks/scale.py --chunks 300000 --search-alone
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from ctxcomp_rag.chunking import Chunk
from ctxcomp_rag.evaluation.provenance import write_result
from ctxcomp_rag.index import MemoryIndex
from ctxcomp_rag.index.vectors import VectorIndex, best_of
from ctxcomp_rag.spans import DecoderFingerprint, SoftSpan, SpanSpec

_CENTRES, _WORDS, _TOP_K = 5000, 24, 10
Floats = NDArray[np.float32]


def spec_of(hidden: int) -> SpanSpec:
    decoder = DecoderFingerprint(model_id="random", revision="", weights_digest="0" * 64, tokenizer_digest="0" * 64,
                                 hidden_size=hidden, num_layers=2, num_kv_heads=2, head_dim=16, rope="{}",
                                 dtype="float16")
    return SpanSpec("soft", decoder, "random")


def vectors_of(batch: int, count: int, size: int, clustered: bool) -> Floats:
    """(count, size), the same for the same batch; batch -1 are the queries."""
    rng = np.random.default_rng([7, batch + 1])
    noise = rng.standard_normal((count, size), dtype=np.float32)
    if not clustered:
        return noise
    centres = np.random.default_rng(3).standard_normal((_CENTRES, size), dtype=np.float32)
    return centres[rng.integers(0, _CENTRES, count)] + 0.7 * noise


def chunks_of(batch: int, count: int) -> list[Chunk]:
    """Ten to a document."""
    rng = np.random.default_rng([11, batch])
    words = rng.integers(0, 50_000, (count, _WORDS)).astype(str).tolist()
    made = []
    for i, row in enumerate(words):
        text = " ".join(row)
        made.append(Chunk(f"document-{(batch * count + i) // 10}", text, 0, len(text), 64, {"batch": batch}))
    return made


class BestOfAll:
    """The best vectors for some queries among all that pass by: what recall is counted against."""

    def __init__(self, queries: Floats) -> None:
        self._queries = queries / np.linalg.norm(queries, axis=1, keepdims=True)
        self.scores = np.full((len(queries), _TOP_K), -np.inf, np.float32)

    def see(self, vectors: Floats) -> None:
        scores = self._queries @ (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).T
        joined = np.concatenate([self.scores, np.partition(scores, -_TOP_K, axis=1)[:, -_TOP_K:]], axis=1)
        self.scores = np.sort(joined, axis=1)[:, : -_TOP_K - 1 : -1]

    def recall(self, found: NDArray[np.floating[Any]]) -> float:
        """Share of the best that were found, by score; found: (queries, _TOP_K)."""
        return float((found >= self.scores[:, -1:] - 1e-5).mean())


def ingest(path: Path, options: argparse.Namespace, best: BestOfAll) -> dict[str, Any]:
    spec = spec_of(options.hidden)
    seconds = cpu = 0.0
    began = time.monotonic()
    with MemoryIndex.create(path, spec, vector_size=options.vector_size, retrieval_encoder="random",
                            codec=options.codec) as index:
        for batch in tqdm(range(options.chunks // options.batch), unit="batch", desc="ingest"):
            vectors = vectors_of(batch, options.batch, options.vector_size, True)
            best.see(vectors)
            chunks = chunks_of(batch, options.batch)
            embeds = torch.randn(options.batch, options.slots, options.hidden, dtype=torch.float32).half()
            positions = torch.arange(options.slots)
            spans = [SoftSpan(c.id, 64, positions, options.slots, e) for c, e in zip(chunks, embeds, strict=True)]
            _, taken = _timed(lambda c=chunks, s=spans, v=vectors: index.add(c, s, v, spec=spec))
            seconds, cpu = seconds + taken["s"], cpu + taken["cpu_s"]
            if time.monotonic() - began > 60 * options.minutes:
                break
        _, closed = _timed(index.close)
        count = len(index)
    return {"chunks": count, "add": {"s": seconds, "cpu_s": cpu}, "chunks_per_s": count / seconds,
            "chunks_per_cpu_s": count / cpu, "save_snapshot": closed, "peak_memory_gib": _peak_gib()}


def read(path: Path, options: argparse.Namespace) -> dict[str, Any]:
    """In a process of its own, so that memory is that of a reader."""
    before = _resident_gib()
    index, opened = _timed(lambda: MemoryIndex.open(path, read_only=True))
    memory = _resident_gib() - before
    queries = vectors_of(-1, options.queries, options.vector_size, True)
    found, hits = _times(lambda q: index.search(q, _TOP_K), queries)
    _, chunks = _times(lambda q: index.search_chunks(q, _TOP_K), queries)
    _, vectors = _times(lambda q: index._vectors.search(q[None], _TOP_K), queries)
    return {"open": opened, "open_memory_gib": memory, "memory_gib": _resident_gib() - before,
            "search_and_take_10_ms": hits, "search_chunks_10_ms": chunks, "faiss_alone_ms": vectors,
            "scores": [[h.score for h in r[0]] for r in found], "faiss": type(index._vectors._index).__name__,
            "bytes": index.stats()["bytes"], "span_bytes": index.stats()["span_bytes"],
            "text_bytes": index.stats()["text_bytes"]}


def change(path: Path) -> dict[str, Any]:
    """Delete one document in a hundred, compact, and open again."""
    with MemoryIndex.open(path) as index:
        gone = list(index._table.documents)[::100]
        deleted, delete = _timed(lambda: index.delete(document_ids=gone))
        _, compact = _timed(lambda: index.compact(erase=True))
        left = len(index)
    return {"deleted": deleted, "delete": delete, "compact": compact, "chunks_left": left,
            "peak_memory_gib": _peak_gib()}


def search_alone(options: argparse.Namespace, clustered: bool) -> dict[str, Any]:
    """The search vectors without a table: what the inverted lists find, on vectors in clusters and on any."""
    size, batches = options.vector_size, options.chunks // options.batch
    index, queries = VectorIndex(size), vectors_of(-1, options.queries, size, clustered)
    best, stored, seconds = BestOfAll(queries), np.empty((options.chunks, size), np.float32), 0.0
    for batch in tqdm(range(batches), unit="batch", desc="search"):
        place = slice(batch * options.batch, (batch + 1) * options.batch)
        stored[place] = vectors_of(batch, options.batch, size, clustered)
        best.see(stored[place])
        _, taken = _timed(lambda p=place: index.add(np.arange(p.start, p.stop), stored[p]))
        seconds += taken["cpu_s"]
    found, times = _times(lambda q: index.search(q[None], _TOP_K)[0], queries)
    exact = [best_of(q[None], [hit], np.sort(hit[0]), stored[np.sort(hit[0])], _TOP_K)[0][1]
             for q, hit in zip(queries, found, strict=True)]
    return {"chunks": options.chunks, "faiss": type(index._index).__name__, "add_cpu_s": seconds, "search_ms": times,
            "recall_at_10": best.recall(np.stack(exact))}


def _timed(work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """Result, and seconds by the clock and of this process's processors: on a busy machine the two differ."""
    start, cpu = time.perf_counter(), time.process_time()
    result = work()
    return result, {"s": time.perf_counter() - start, "cpu_s": time.process_time() - cpu}


def _times(ask: Callable[[Floats], Any], queries: Floats) -> tuple[list[Any], dict[str, float]]:
    answers, taken, cpu = [], [], time.process_time()
    for query in queries:
        start = time.perf_counter()
        answers.append(ask(query))
        taken.append(1e3 * (time.perf_counter() - start))
    mean = 1e3 * (time.process_time() - cpu) / len(queries)
    return answers, {"first": taken[0], "p50": float(np.percentile(taken, 50)),
                     "p99": float(np.percentile(taken, 99)), "mean_cpu": mean}


def _peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _resident_gib() -> float:
    line = next(row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith("VmRSS"))
    return int(line.split()[1]) / 2**20


def _apart(work: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    with multiprocessing.get_context("spawn").Pool(1, initializer=_bounded) as pool:
        return pool.apply(work, arguments)


def _bounded(gib: int = 10) -> None:
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_DATA, (gib * 2**30, gib * 2**30))


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _ingest_apart(path: Path, options: argparse.Namespace) -> dict[str, Any]:
    best = BestOfAll(vectors_of(-1, options.queries, options.vector_size, True))
    return {**ingest(path, options, best), "best": best.scores.tolist()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunks", type=int, default=100_000)
    parser.add_argument("--vector-size", type=int, default=384)
    parser.add_argument("--slots", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=32)
    parser.add_argument("--codec", default="exact")
    parser.add_argument("--batch", type=int, default=10_000)
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=25.0, help="Ingest stops after these.")
    parser.add_argument("--search-alone", action="store_true", help="No index: only the search vectors, for recall.")
    parser.add_argument("--folder", type=Path, default=None, help="Where the index goes (a temporary folder).")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        result: dict[str, Any] = {"load_before": os.getloadavg()[0]}
        for name, values in _phases(folder / "kb", options):
            result[name] = _rounded(values)
            print(name, result[name], flush=True)
        result["load_after"] = os.getloadavg()[0]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    name = f"search_{options.chunks}" if options.search_alone else f"scale_{result['ingest']['chunks']}"
    out = options.out or Path(__file__).parent / "results" / f"{name}.json"
    write_result(out, {**{k: v for k, v in vars(options).items() if k not in ("folder", "out")}, **result})


def _phases(path: Path, options: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    if options.search_alone:
        yield "in_clusters", _apart(search_alone, options, True)
        yield "without_structure", _apart(search_alone, options, False)
        return
    made = _apart(_ingest_apart, path, options)
    best = BestOfAll(vectors_of(-1, options.queries, options.vector_size, True))
    best.scores = np.asarray(made.pop("best"), np.float32)
    yield "ingest", made

    def reading() -> dict[str, Any]:
        seen = _apart(read, path, options)
        recall = best.recall(np.asarray(seen.pop("scores")))
        return {**seen, "bytes_per_chunk": seen["bytes"] / made["chunks"], "recall_at_10": recall}

    yield "read", reading()
    yield "change", _apart(change, path)
    reread = reading()
    yield "read_after_compaction", {k: v for k, v in reread.items() if k != "recall_at_10"}


if __name__ == "__main__":
    sys.exit(main())
