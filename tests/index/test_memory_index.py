"""MemoryIndex: what is acknowledged is there, what is there is right, and what is not right is named."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ctxcomp_rag.chunking import Chunk
from ctxcomp_rag.errors import (
    IncompatibleSpanError,
    IndexDamagedError,
    IndexFolderError,
    IndexLockedError,
    InputError,
    SpanShapeError,
)
from ctxcomp_rag.index import MemoryIndex
from ctxcomp_rag.index.vectors import normalised
from ctxcomp_rag.spans import SoftSpan, SpanSpec
from tests.index.checks import QUERIES, assert_holds, assert_same_span
from tests.index.conftest import (
    KV,
    OTHER_DECODER,
    SOFT,
    VECTOR_SIZE,
    Corpus,
    cosine,
    data_files,
    flip_byte,
    kv_span,
    make_corpus,
    soft_span,
)

ROOT = Path(__file__).parents[2]
CORPUS = make_corpus(40)


# ---- storing and finding ---------------------------------------------------------------------------------------


def test_what_was_added_is_found_again_after_reopening(index: MemoryIndex, path: Path) -> None:
    assert vars(CORPUS.add_to(index)) == {"added": 40, "skipped": 0}
    assert_holds(index, CORPUS)
    index.close()
    with MemoryIndex.open(path, read_only=True) as again:
        assert (len(again), again.vector_size, again.retrieval_encoder) == (40, VECTOR_SIZE, "minilm")
        assert again.spec.fingerprint == SOFT.fingerprint
        assert {k: v.tolist() for k, v in again.spec.delimiters.items()} == \
               {k: v.tolist() for k, v in SOFT.delimiters.items()}
        assert_holds(again, CORPUS)


def test_bf16_and_kv_spans_come_back_bit_for_bit(tmp_path: Path) -> None:
    corpus = make_corpus(3)
    for name, spec, make in (("soft", SOFT, soft_span), ("kv", KV, kv_span)):
        spans = [make(c, i, torch.bfloat16) for i, c in enumerate(corpus.chunks)]
        made = Corpus(corpus.chunks, spans, corpus.vectors)
        with MemoryIndex.create(tmp_path / name, spec, vector_size=VECTOR_SIZE, retrieval_encoder="e",
                                codec="exact") as index:
            made.add_to(index, spec=spec)
        with MemoryIndex.open(tmp_path / name) as index:
            assert_holds(index, made)


def test_adding_again_changes_nothing(index: MemoryIndex) -> None:
    CORPUS.add_to(index, slice(0, 10))
    assert vars(CORPUS.add_to(index, slice(5, 15))) == {"added": 5, "skipped": 5}
    twice = make_corpus(40)
    twice.chunks[16:20] = twice.chunks[15:16] * 4
    twice.spans = [soft_span(c, 15) for c in twice.chunks]
    assert vars(twice.add_to(index, slice(15, 20))) == {"added": 1, "skipped": 4}
    assert vars(index.add([], [], np.empty((0, VECTOR_SIZE)), spec=SOFT)) == {"added": 0, "skipped": 0}
    assert sorted(c.id for c in index.chunks()) == sorted(CORPUS.ids[:16])
    assert_holds(index, Corpus(CORPUS.chunks, [*CORPUS.spans[:15], soft_span(CORPUS.chunks[15], 15)],
                               np.concatenate([CORPUS.vectors[:15], twice.vectors[15:16]])), slice(0, 16))


def test_missing_is_what_a_resumed_job_has_to_do(index: MemoryIndex) -> None:
    CORPUS.add_to(index, slice(0, 30))
    assert index.missing(CORPUS.ids) == set(CORPUS.ids[30:])


@pytest.mark.parametrize(("where", "keep"), [
    ({"lang": "de"}, lambda c: c.metadata["lang"] == "de"),
    ({"lang": "de", "year": [2000, 2002]}, lambda c: c.metadata["lang"] == "de" and c.metadata["year"] != 2001),
    ({"document_id": "d2"}, lambda c: c.document_id == "d2"),
    ({"document_id": ("d2", "d3", "none"), "year": 2001.0},
     lambda c: c.document_id in ("d2", "d3") and c.metadata["year"] == 2001),
    ({"draft": True}, lambda c: c.metadata.get("draft") is True),
    ({"draft": 1}, lambda c: False),
    ({"draft": None}, lambda c: False),
    ({"year": {2001}, "document_id": "d'2"}, lambda c: False),
    ({}, lambda c: True),
])
def test_filters_apply_before_the_best_are_chosen(index: MemoryIndex, where: dict[str, Any], keep: Any) -> None:
    CORPUS.add_to(index, slice(0, 20))
    CORPUS.add_to(index, slice(20, 40))
    allowed = [i for i, c in enumerate(CORPUS.chunks) if keep(c)]
    for top_k in (1, 5, 100):
        found = index.search(QUERIES, top_k, where=where)
        for hits, similarities in zip(found, cosine(QUERIES, CORPUS.vectors), strict=True):
            best = sorted(allowed, key=lambda i: -similarities[i])[:top_k]
            assert [h.chunk for h in hits] == [CORPUS.chunks[i] for i in best]
            np.testing.assert_allclose([h.score for h in hits], similarities[best], atol=1e-6)
            for hit, i in zip(hits, best, strict=True):
                assert_same_span(hit.span, CORPUS.spans[i])


def test_search_takes_one_query_or_many_and_any_length_of_vector(index: MemoryIndex) -> None:
    assert index.search(QUERIES, 3) == [[], [], []]
    CORPUS.add_to(index)
    (one,) = index.search(QUERIES[1], 4)
    many = index.search(QUERIES.astype(np.float64) * 1e3, 4)
    assert [h.chunk.id for h in one] == [h.chunk.id for h in many[1]]
    chunks = index.search_chunks(QUERIES, 4)
    assert [[(h.chunk, h.score) for h in hits] for hits in many] == chunks


def test_chunks_of_a_document_in_the_order_of_its_text(index: MemoryIndex) -> None:
    backwards = Corpus(CORPUS.chunks[::-1], CORPUS.spans[::-1], CORPUS.vectors[::-1])
    backwards.add_to(index, slice(0, 15))
    backwards.add_to(index, slice(15, 40))
    assert index.document_chunks("d3") == [c.id for c in CORPUS.chunks if c.document_id == "d3"]
    assert index.document_chunks("none") == []


def test_stats_count(index: MemoryIndex, path: Path) -> None:
    CORPUS.add_to(index)
    stats = index.stats()
    assert stats["bytes"] == sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
    texts = sum(len(c.text.encode()) for c in CORPUS.chunks)
    assert {k: stats[k] for k in ("chunks", "documents", "source_tokens", "slots", "text_bytes")} == {
        "chunks": 40, "documents": 5, "source_tokens": 320, "slots": 160, "text_bytes": texts}
    assert 40 * 4 * 16 * 4 < stats["span_bytes"] < 40 * (4 * 16 * 4 + 600)


def test_a_large_index_searches_codes_and_scores_exactly(
    index: MemoryIndex, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ctxcomp_rag.index.vectors.FLAT_MOST", 160)
    monkeypatch.setattr("ctxcomp_rag.index.vectors.LISTS", 4)
    corpus = make_corpus(200)
    corpus.add_to(index, slice(0, 100))
    corpus.add_to(index, slice(100, 200))
    assert_holds(index, corpus)
    np.testing.assert_allclose(index.vectors(corpus.ids[::-1]), normalised(corpus.vectors[::-1]), atol=1e-6)
    index.delete(chunk_ids=corpus.ids[:50])
    index.close()
    with MemoryIndex.open(path) as again:
        assert_holds(again, corpus, slice(50, 200))
        best = cosine(QUERIES, corpus.vectors)
        for hits, scores in zip(again.search(QUERIES, 3, where={"document_id": "d3"}), best, strict=True):
            allowed = [i for i in range(50, 200) if corpus.chunks[i].document_id == "d3"]
            assert [h.score for h in hits] == pytest.approx(sorted(scores[allowed], reverse=True)[:3], abs=1e-6)
        (path / "CURRENT.json").unlink()
    with MemoryIndex.open(path, read_only=True) as rebuilt:
        assert_holds(rebuilt, corpus, slice(50, 200))


# ---- deleting --------------------------------------------------------------------------------------------------


def test_deleted_chunks_are_gone_and_compaction_erases_them(index: MemoryIndex, path: Path) -> None:
    for start in range(0, 40, 10):
        CORPUS.add_to(index, slice(start, start + 10))
    secret = CORPUS.chunks[0].text.encode()
    assert any(secret in file.read_bytes() for file in data_files(path))
    assert index.delete(document_ids=["d0", "none"]) == 8
    assert index.delete(chunk_ids=[CORPUS.ids[1], CORPUS.ids[0], "none"]) == 1
    left = [i for i, c in enumerate(CORPUS.chunks) if c.document_id != "d0" and i != 1]
    rest = Corpus([CORPUS.chunks[i] for i in left], [CORPUS.spans[i] for i in left], CORPUS.vectors[left])
    assert_holds(index, rest)
    index.compact()
    assert_holds(index, rest)
    assert len(data_files(path)) == 1
    assert not any(secret in file.read_bytes() for file in path.rglob("*") if file.is_file())
    index.close()
    with MemoryIndex.open(path) as again:
        assert_holds(again, rest)
        # a chunk that comes back with another vector is found by that one, whatever a snapshot remembers
        again.add([CORPUS.chunks[1]], [CORPUS.spans[1]], -CORPUS.vectors[1:2], spec=SOFT)
        assert again.search(-CORPUS.vectors[1], 1)[0][0].score == pytest.approx(1, abs=1e-6)


def test_many_small_commits_are_compacted_on_the_way(
    index: MemoryIndex, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ctxcomp_rag.index.memory_index._COMMITS_BETWEEN_COMPACTIONS", 8)
    with MemoryIndex.open(path, read_only=True) as reader:
        for i in range(20):
            CORPUS.add_to(index, slice(i, i + 1))
        assert len(data_files(path)) == 5  # two compactions: 16 commits became one file
        assert_holds(index, CORPUS, slice(0, 20))
        reader.refresh()
        assert [c.id for c in reader.chunks()] == CORPUS.ids[:20]


def test_all_chunks_can_be_deleted(index: MemoryIndex, path: Path) -> None:
    CORPUS.add_to(index)
    assert index.delete(chunk_ids=CORPUS.ids) == 40
    index.compact()
    assert (len(index), index.search(QUERIES, 3), index.stats()["documents"]) == (0, [[], [], []], 0)
    CORPUS.add_to(index)
    assert_holds(index, CORPUS)


# ---- what is refused -------------------------------------------------------------------------------------------


def test_spans_for_another_decoder_or_by_another_compressor_are_refused(index: MemoryIndex) -> None:
    other = SpanSpec("soft", OTHER_DECODER, "icae-1f0c", delimiters=SOFT.delimiters)
    with pytest.raises(IncompatibleSpanError, match=r"tiny/llama.*tiny/qwen"):
        CORPUS.add_to(index, spec=other)
    other = SpanSpec("soft", SOFT.decoder, "pcc-9", delimiters=SOFT.delimiters)
    with pytest.raises(IncompatibleSpanError, match=r"icae-1f0c.*pcc-9"):
        CORPUS.add_to(index, spec=other)
    chunk = CORPUS.chunks[0]
    with pytest.raises(SpanShapeError, match="expected a soft span, got the kv span"):
        index.add([chunk], [kv_span(chunk)], CORPUS.vectors[:1], spec=SOFT)
    narrow = SoftSpan(chunk.id, 8, torch.arange(2), 2, torch.randn(2, 15))
    with pytest.raises(SpanShapeError, match=r"\(2, 16\), got \(2, 15\)"):
        index.add([chunk], [narrow], CORPUS.vectors[:1], spec=SOFT)
    assert len(index) == 0


def test_lists_that_do_not_fit_together_are_refused(index: MemoryIndex) -> None:
    c, s, v = CORPUS.chunks[:2], CORPUS.spans[:2], CORPUS.vectors[:2]
    with pytest.raises(InputError, match="got 2 chunks, 1 spans and 2 vectors"):
        index.add(c, s[:1], v, spec=SOFT)
    with pytest.raises(InputError, match=f"expected the span of chunk '{c[0].id}' at place 0"):
        index.add(c, s[::-1], v, spec=SOFT)
    bad = Chunk("d", "text", 0, 4, 8, {"authors": ["x"]})  # type: ignore[dict-item]
    with pytest.raises(InputError, match="'authors': list"):
        index.add([bad], [soft_span(bad)], v[:1], spec=SOFT)
    bad = Chunk("d", "half a \ud83c pair", 0, 13, 8)
    with pytest.raises(InputError, match=r"UTF-8, got '\\ud83c'"):
        index.add([bad], [soft_span(bad)], v[:1], spec=SOFT)
    with pytest.raises(InputError, match="a single string"):
        index.delete(document_ids="d1")
    assert len(index) == 0


@pytest.mark.parametrize(("vector", "match"), [
    (np.ones(VECTOR_SIZE + 1), rf"expected vectors of shape \(n, {VECTOR_SIZE}\), got \(1, {VECTOR_SIZE + 1}\)"),
    (np.full(VECTOR_SIZE, np.nan), "holds NaN or infinite numbers"),
    (np.full(VECTOR_SIZE, 1e300), "holds NaN or infinite numbers"),
    (np.zeros(VECTOR_SIZE), "holds only zeros"),
    (np.array(["x"] * VECTOR_SIZE), "of <U1"),
])
def test_vectors_that_mean_nothing_are_refused(index: MemoryIndex, vector: np.ndarray, match: str) -> None:
    with pytest.raises(InputError, match=match):
        index.search(vector, 1)
    with pytest.raises(InputError, match=match):
        index.add(CORPUS.chunks[:1], CORPUS.spans[:1], vector[None], spec=SOFT)


def test_wrong_questions_are_refused(index: MemoryIndex) -> None:
    CORPUS.add_to(index, slice(0, 2))
    for top_k in (0, -1, True, 2.5):
        with pytest.raises(InputError, match="expected top_k of at least 1"):
            index.search(QUERIES, top_k)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="where"):
        index.search(QUERIES, 1, where={"year": {"$gt": 3}})  # type: ignore[dict-item]
    with pytest.raises(InputError, match="got 'nonsense' and 1 more"):
        index.get([CORPUS.ids[0], "nonsense", "other"])


def test_folders_that_are_no_index(tmp_path: Path, index: MemoryIndex, path: Path) -> None:
    with pytest.raises(IndexFolderError, match=r"nothing is there\. Check the path, or create"):
        MemoryIndex.open(tmp_path / "none")
    (tmp_path / "file").write_text("x")
    with pytest.raises(IndexFolderError, match="but a file is there"):
        MemoryIndex.open(tmp_path / "file")
    with pytest.raises(IndexFolderError, match=r"index.json in .* is missing"):
        MemoryIndex.open(tmp_path)
    with pytest.raises(IndexFolderError, match=r"an index is there already. Open it"):
        MemoryIndex.create(path, SOFT, vector_size=3, retrieval_encoder="e")
    with pytest.raises(IndexFolderError, match="Choose a folder that you may write to"):
        MemoryIndex.create(tmp_path / "file" / "kb", SOFT, vector_size=3, retrieval_encoder="e")
    with pytest.raises(IndexFolderError, match="other files"):
        MemoryIndex.create(tmp_path, SOFT, vector_size=3, retrieval_encoder="e")


def test_a_manifest_that_is_missing_or_altered(index: MemoryIndex, path: Path) -> None:
    index.close()
    whole = (path / "index.json").read_text()
    (path / "index.json").unlink()
    with pytest.raises(IndexFolderError, match=r"holds spans: restore index\.json"):
        MemoryIndex.open(path)
    for harm in (whole[:50], whole.replace('"icae-1f0c"', '"icae-2"'), "[]", whole.replace('"kind"', '"kink"')):
        (path / "index.json").write_text(harm)
        with pytest.raises(IndexDamagedError, match="Restore"):
            MemoryIndex.open(path)
    (path / "index.json").write_text(whole.replace('"format_version": 1', '"format_version": 2'))
    with pytest.raises(IndexFolderError, match="Upgrade"):
        MemoryIndex.open(path)
    (path / "index.json").write_text(whole)
    (path / "delimiters.safetensors").unlink()
    with pytest.raises(IndexDamagedError, match="delimiters"):
        MemoryIndex.open(path)


# ---- several readers, one writer -------------------------------------------------------------------------------


def test_a_reader_sees_its_version_until_it_refreshes(index: MemoryIndex, path: Path) -> None:
    CORPUS.add_to(index, slice(0, 10))
    with MemoryIndex.open(path, read_only=True) as reader:
        CORPUS.add_to(index, slice(10, 20))
        index.delete(chunk_ids=CORPUS.ids[:5])
        with MemoryIndex.open(path, read_only=True) as newer:  # a deletion is immediate for who comes after it
            assert_holds(newer, CORPUS, slice(5, 20))
        index.compact()
        assert_holds(reader, CORPUS, slice(0, 10))
        reader.refresh()
        assert_holds(reader, CORPUS, slice(5, 20))
        index.delete(chunk_ids=CORPUS.ids[5:7])
        index.compact(erase=True)  # takes away the files that the reader has open: it moves on by itself
        assert_holds(reader, CORPUS, slice(7, 20))
        with pytest.raises(IndexFolderError, match="opened for reading"):
            CORPUS.add_to(reader)


def test_compaction_removes_old_files_once_nobody_reads_them(index: MemoryIndex, path: Path) -> None:
    CORPUS.add_to(index, slice(0, 10))
    readers = [MemoryIndex.open(path, read_only=True) for _ in range(2)]
    for start in (10, 20, 30):
        CORPUS.add_to(index, slice(start, start + 10))
    for reader in readers:
        index.compact()
        assert len(data_files(path)) == 2  # the reader's, and the merged one
        assert_holds(reader, CORPUS, slice(0, 10))
        reader.close()
    index.compact()
    assert len(data_files(path)) == 1
    assert not any((path / "readers").iterdir())


def test_an_index_may_be_read_where_nothing_may_be_written(
    index: MemoryIndex, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    CORPUS.add_to(index)
    index.close()
    shutil.rmtree(path / "readers")

    def refused(*_: object, **__: object) -> None:
        raise PermissionError("read-only file system")

    monkeypatch.setattr("ctxcomp_rag.index.pins.Path.mkdir", refused)
    with MemoryIndex.open(path, read_only=True) as reader:
        assert_holds(reader, CORPUS)


def test_two_writers_in_one_process(index: MemoryIndex, path: Path) -> None:
    CORPUS.add_to(index, slice(0, 10))
    with MemoryIndex.open(path) as second:
        with pytest.raises(IndexLockedError, match=rf"another MemoryIndex of this process \(process id {os.getpid()}"):
            CORPUS.add_to(second, slice(0, 20))
        CORPUS.add_to(index, slice(10, 12))
        index.close()
        # the second writer first looks at what the first one left
        assert vars(CORPUS.add_to(second, slice(0, 20))) == {"added": 8, "skipped": 12}
        assert_holds(second, CORPUS, slice(0, 20))
    with pytest.raises(IndexFolderError, match="was closed"):
        CORPUS.add_to(index)


CHILD = """
import sys
import faiss
faiss.omp_set_num_threads(1)
from ctxcomp_rag.index import MemoryIndex
from tests.index.conftest import make_corpus
corpus = make_corpus(400)
index = MemoryIndex.open(sys.argv[1])
step = int(sys.argv[2])
for start in range(0, 400, step):
    part = slice(start, start + step)
    if index.missing(corpus.ids[part]):
        corpus.add_to(index, part)
    print(start + step, flush=True)
    if len(sys.argv) > 3:
        sys.stdin.readline()
"""


def child(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", CHILD, *map(str, arguments)], cwd=ROOT, text=True,
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def test_two_writers_in_two_processes(index: MemoryIndex, path: Path) -> None:
    index.close()
    writer = child(path, 10, "wait")
    assert writer.stdout is not None
    assert writer.stdout.readline() == "10\n"
    with MemoryIndex.open(path) as second:
        assert len(second) == 10
        with pytest.raises(IndexLockedError, match=rf"another process \(process id {writer.pid}\) is writing"):
            CORPUS.add_to(second)
        writer.kill()  # its lock dies with it
        writer.communicate()
        CORPUS.add_to(second)
        assert len(second) == len(set(CORPUS.ids) | set(make_corpus(400).ids[:10]))


def test_threads_may_search_while_others_add_and_delete(index: MemoryIndex) -> None:
    CORPUS.add_to(index, slice(0, 20))
    similarities = dict(zip(CORPUS.ids, cosine(QUERIES[:1], CORPUS.vectors)[0], strict=True))
    spans = dict(zip(CORPUS.ids, CORPUS.spans, strict=True))
    stop, errors, searches = threading.Event(), [], 0

    def search(where: dict[str, Any] | None) -> None:
        nonlocal searches
        try:
            while not stop.is_set():
                (hits,) = index.search(QUERIES[0], 10, where=where)
                assert len(hits) == 10
                assert [h.score for h in hits] == sorted((h.score for h in hits), reverse=True)
                for hit in hits:
                    assert hit.score == pytest.approx(similarities[hit.chunk.id], abs=1e-6)
                    assert_same_span(hit.span, spans[hit.chunk.id])
                searches += 1
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=search, args=(w,)) for w in (None, {"document_id": ["d0", "d1", "d2", "d3"]})]
    for thread in threads:
        thread.start()
    for start in (20, 25, 30, 35):
        CORPUS.add_to(index, slice(start, start + 5))
        index.delete(chunk_ids=CORPUS.ids[start : start + 2])
    index.compact()
    stop.set()
    for thread in threads:
        thread.join()
    assert errors == []
    assert searches > 0
    assert index.verify().notes == []


# ---- damage ----------------------------------------------------------------------------------------------------


@pytest.fixture
def stored(index: MemoryIndex, path: Path) -> Path:
    """A closed index of two commits: chunks 0-9 and 10-19."""
    CORPUS.add_to(index, slice(0, 10))
    CORPUS.add_to(index, slice(10, 20))
    index.close()
    return path


@pytest.mark.parametrize("field", ["span", "text", "vector"])
def test_a_flipped_bit_is_found_and_named(stored: Path, field: str) -> None:
    chunk, span = CORPUS.chunks[13], CORPUS.spans[13]
    assert isinstance(span, SoftSpan)
    stretch = {"span": span.embeds.numpy().tobytes(), "text": chunk.text.encode(),
               "vector": CORPUS.vectors[13].tobytes()}[field]
    file = data_files(stored)[1]
    flip_byte(file, file.read_bytes().index(stretch) + 5)
    with MemoryIndex.open(stored) as index:
        report = index.verify()
        assert [(d.chunk_id, d.document_id) for d in report.damaged] == [(chunk.id, chunk.document_id)]
        assert not report.ok
        with pytest.raises(IndexDamagedError, match=f"chunk '{chunk.id}' of document 'd3' is damaged"):
            index.get([chunk.id])
        assert len(index.get(CORPUS.ids[:13])) == 13
        # the way out: delete it, add it again
        index.delete(chunk_ids=[chunk.id])
        assert CORPUS.add_to(index, slice(0, 20)).added == 1
        index.compact()
        assert_holds(index, CORPUS, slice(0, 20))


def test_a_torn_data_file_costs_only_its_own_chunks(stored: Path) -> None:
    file = data_files(stored)[1]
    os.truncate(file, 700)
    with pytest.warns(UserWarning, match=file.name):
        index = MemoryIndex.open(stored)
    with index:
        assert len(index) == 10
        report = index.verify()
        assert [(d.chunk_id, file.name in d.reason) for d in report.damaged] == [("", True)]
        assert len(index.search(QUERIES, 20, where={"year": [2000, 2001, 2002]})[0]) == 10
        with pytest.raises(IndexDamagedError, match="drop_unreadable=True"):
            index.compact()
        assert index.missing(CORPUS.ids[:20]) == set(CORPUS.ids[10:20])
        CORPUS.add_to(index, slice(0, 20))
        assert len(index) == 20
        index.compact(drop_unreadable=True)
        assert_holds(index, CORPUS, slice(0, 20))
    with MemoryIndex.open(stored) as again:
        assert_holds(again, CORPUS, slice(0, 20))


def test_a_torn_file_of_large_spans_names_their_chunks(tmp_path: Path) -> None:
    chunks = make_corpus(3).chunks
    spans = [SoftSpan(c.id, 8, torch.arange(3000), 3000, torch.randn(3000, 16)) for c in chunks]
    with MemoryIndex.create(tmp_path / "kb", SOFT, vector_size=VECTOR_SIZE, retrieval_encoder="e",
                            codec="exact") as index:
        Corpus(chunks, spans, CORPUS.vectors[:3]).add_to(index)
    (blob,) = (tmp_path / "kb").rglob("*.blob")
    os.truncate(blob, blob.stat().st_size - 1000)
    with MemoryIndex.open(tmp_path / "kb") as index:
        assert [d.chunk_id for d in index.verify().damaged] == [chunks[2].id]
        assert_same_span(index.get([chunks[1].id])[0].span, spans[1])
        with pytest.raises(IndexDamagedError, match=r"Run verify\(\)"):
            index.get([chunks[2].id])


@pytest.mark.parametrize("size", [0, 100])
def test_a_torn_last_commit_falls_back_to_the_one_before(stored: Path, size: int) -> None:
    """A power cut may leave an empty manifest: everything before it is still there."""
    manifest = min((stored / "spans.lance" / "_versions").glob("*.manifest"))
    os.truncate(manifest, size)
    with pytest.warns(UserWarning, match=f"{manifest.name} cannot be read"):
        index = MemoryIndex.open(stored)
    with index:
        assert [d.reason for d in index.verify().damaged] == [
            f"{manifest.name} cannot be read: the last change of the index is missing"]
        assert len(index) == 10
        # the lost rows' ids are given out again, to other chunks: the snapshot on disk must not be believed
        CORPUS.add_to(index, slice(20, 30))
    with MemoryIndex.open(stored) as index:
        assert [c.id for c in index.chunks()] == CORPUS.ids[:10] + CORPUS.ids[20:30]
        CORPUS.add_to(index, slice(10, 20))
        assert_holds(index, CORPUS, slice(0, 30))


def test_an_index_that_is_deleted_under_a_reader(stored: Path) -> None:
    with MemoryIndex.open(stored, read_only=True) as reader:
        shutil.rmtree(stored)
        with pytest.raises(IndexFolderError, match="moved or deleted"):
            reader.refresh()
        with pytest.raises(IndexDamagedError, match=r"Run verify\(\)"):
            reader.get(CORPUS.ids[:1])


def test_an_index_without_any_manifest(stored: Path) -> None:
    for manifest in (stored / "spans.lance" / "_versions").glob("*.manifest"):
        os.truncate(manifest, 0)
    with pytest.raises(IndexDamagedError, match="expected a readable Lance table"):
        MemoryIndex.open(stored)


@pytest.mark.parametrize("harm", ["missing", "torn", "of an older version", "of another index"])
def test_a_search_snapshot_only_saves_time(stored: Path, tmp_path: Path, harm: str) -> None:
    (snapshot,) = stored.glob("faiss-*.bin")
    if harm == "missing":
        snapshot.unlink()
    elif harm == "torn":
        os.truncate(snapshot, 100)
    elif harm == "of an older version":
        before = {p.name: p.read_bytes() for p in (snapshot, stored / "CURRENT.json")}
        with MemoryIndex.open(stored) as index:
            index.delete(chunk_ids=CORPUS.ids[:3])
            CORPUS.add_to(index, slice(0, 25))
        for name, data in before.items():
            (stored / name).write_bytes(data)
    else:
        with MemoryIndex.create(tmp_path / "b", SOFT, vector_size=VECTOR_SIZE, retrieval_encoder="e",
                                codec="exact") as other:
            make_corpus(20, seed=1).add_to(other)
        for file in ((tmp_path / "b" / "CURRENT.json"), *(tmp_path / "b").glob("faiss-*.bin")):
            shutil.copy(file, stored)
        with MemoryIndex.open(stored) as index:  # right ids, wrong vectors: only verify can tell
            assert index.verify().notes == ["the search vectors were not those of the chunks; they were made again"]
            assert_holds(index, CORPUS, slice(0, 20))
        return
    with MemoryIndex.open(stored) as index:
        assert_holds(index, CORPUS, slice(0, 25 if "older" in harm else 20))


# ---- the disk is full ------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Two megabytes."""
    (tmp_path / "disk").mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", tmp_path / "disk"], capture_output=True)
    if made.returncode:
        pytest.skip(f"needs the right to mount a small disk: {made.stderr.decode().strip()}")
    yield tmp_path / "disk"
    subprocess.run(["umount", "-l", tmp_path / "disk"], check=True)


def test_a_full_disk_loses_nothing_and_resumes(small_disk: Path) -> None:
    chunks = make_corpus(12).chunks
    spans = [SoftSpan(c.id, 8, torch.arange(2500), 2500, torch.randn(2500, 16)) for c in chunks]
    corpus = Corpus(chunks, spans, CORPUS.vectors[:12])
    path = small_disk / "kb"
    held = 0
    with MemoryIndex.create(path, SOFT, vector_size=VECTOR_SIZE, retrieval_encoder="e", codec="exact") as index:
        with pytest.raises(IndexFolderError) as raised:  # noqa: PT012
            for start in range(0, 12, 2):
                corpus.add_to(index, slice(start, start + 2))
                held += 2
        assert re.search(r"disk is full: none of the 2 chunks.*run the same command again", str(raised.value))
        assert 0 < held < 12
        assert_holds(index, corpus, slice(0, held))
        free = shutil.disk_usage(small_disk).free
        assert free > 50_000  # the failed batch left nothing behind
    with MemoryIndex.open(path) as index:
        assert_holds(index, corpus, slice(0, held))
    subprocess.run(["mount", "-o", "remount,size=8m", small_disk], check=True)
    with MemoryIndex.open(path) as index:
        assert corpus.add_to(index).added == 12 - held
        assert_holds(index, corpus)


def fill(disk: Path) -> Path:
    """A file that leaves less than a page."""
    filler = disk / "filler"
    with open(filler, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(b"x" * 4096):
            pass
    return filler


@pytest.mark.parametrize("operation", ["delete", "compact", "compact --erase"])
def test_a_disk_that_is_full_when_chunks_are_deleted_or_compacted(small_disk: Path, operation: str) -> None:
    path = small_disk / "kb"
    with MemoryIndex.create(path, SOFT, vector_size=VECTOR_SIZE, retrieval_encoder="e", codec="exact") as index:
        CORPUS.add_to(index, slice(0, 10))
        CORPUS.add_to(index, slice(10, 20))
        filler = fill(small_disk)

        def change() -> None:
            if operation == "delete":
                index.delete(chunk_ids=CORPUS.ids[:5])
            else:
                index.compact(erase=operation.endswith("erase"))

        with pytest.raises(IndexFolderError, match=r"disk is full: .*run the same command again"):
            change()
        assert_holds(index, CORPUS, slice(0, 20))
        with MemoryIndex.open(path, read_only=True) as reader:
            assert_holds(reader, CORPUS, slice(0, 20))
        filler.unlink()
        change()
        assert_holds(index, CORPUS, slice(5 if operation == "delete" else 0, 20))


def test_a_search_snapshot_that_does_not_fit_the_disk_only_costs_time(small_disk: Path) -> None:
    path = small_disk / "kb"
    index = MemoryIndex.create(path, SOFT, vector_size=VECTOR_SIZE, retrieval_encoder="e", codec="exact")
    CORPUS.add_to(index, slice(0, 20))
    filler = fill(small_disk)
    with pytest.warns(UserWarning, match="snapshot .* was not saved"):
        index.close()
    with MemoryIndex.open(path) as again:
        assert_holds(again, CORPUS, slice(0, 20))
        filler.unlink()
        CORPUS.add_to(again, slice(20, 40))
    with MemoryIndex.open(path) as again:
        assert_holds(again, CORPUS)


def test_what_lies_in_the_folder(stored: Path) -> None:
    """No pickle: JSON, safetensors, Lance and FAISS files only."""
    suffixes = {p.suffix for p in stored.rglob("*") if p.is_file()}
    assert suffixes <= {".json", ".safetensors", ".lance", ".blob", ".manifest", ".txn", ".bin", ".lock"}
    assert json.loads((stored / "index.json").read_text())["fingerprint"] == SOFT.fingerprint
