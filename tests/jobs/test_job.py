"""The job: what it stores, how often it compresses, how far it reads ahead, what is left when it ends early."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from ctxcomp_rag.backbone import load_frozen
from ctxcomp_rag.chunking import Document, split_document
from ctxcomp_rag.compressors import load_trained_compressor
from ctxcomp_rag.errors import IndexLockedError, InputError
from ctxcomp_rag.index import MemoryIndex
from ctxcomp_rag.jobs import IndexReport, Progress, SpanWorker, Stop, ThreadWorker, ledger, precompress
from ctxcomp_rag.retention import MeasuringCompressor
from tests.jobs.conftest import POISON, HashCompressor, documents
from tests.tiny_models import LetterCounts


def run(texts: list[Document] | Iterator[Document], memory: MemoryIndex, compressor: HashCompressor,
        **options: object) -> IndexReport:
    factor = options.get("factor")
    worker = SpanWorker(compressor, LetterCounts(), factor=factor)  # type: ignore[arg-type]
    return precompress(texts, memory, compressor, ThreadWorker(worker), **options)  # type: ignore[arg-type]


def test_what_is_stored_is_what_each_chunk_gives_by_itself(memory: MemoryIndex, compressor: HashCompressor) -> None:
    corpus = documents(9)
    chunks = [c for d in corpus for c in split_document(d, compressor.backbone.tokenizer, max_tokens=32)]
    report = run(corpus, memory, compressor, batch_tokens=64)
    assert (report.documents, report.chunks, report.added) == (9, len(chunks), len(chunks))
    assert (report.source_tokens, report.skipped) == (sum(c.num_tokens for c in chunks), 0)
    expected = HashCompressor(compressor.backbone).compress(chunks)
    stored = memory.get([c.id for c in chunks])
    assert report.slots == sum(s.num_slots for s in expected)
    for chunk, span, found in zip(chunks, expected, stored, strict=True):
        assert found.chunk == chunk
        assert torch.equal(found.span.embeds, span.embeds)  # type: ignore[union-attr]
    unit = LetterCounts().encode([c.text for c in chunks])
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    assert np.allclose(memory.vectors([c.id for c in chunks]), unit, atol=1e-6)


def test_a_text_is_compressed_once_and_stored_for_each_of_its_chunks(memory: MemoryIndex,
                                                                     compressor: HashCompressor) -> None:
    same = [Document(f"copy{i}", "The same words.", {"i": i}) for i in range(3)]
    report = run([same[0], *documents(40), same[1], same[2]], memory, compressor, batch_tokens=32)
    assert compressor.texts.count("The same words.") == 1
    assert report.added == report.compressed + 2
    again = run([same[0], Document("copy9", "The same words.")], memory, compressor)
    assert (again.added, again.compressed, again.skipped) == (1, 0, 1)
    found = [memory.get(list(memory.chunk_ids(f"copy{i}")))[0] for i in (0, 1, 2, 9)]
    assert [f.chunk.metadata for f in found] == [{"i": 0}, {"i": 1}, {"i": 2}, {}]
    assert all(torch.equal(f.span.embeds, found[0].span.embeds) for f in found)  # type: ignore[union-attr]
    assert memory.verify().ok


def test_documents_are_read_as_they_are_needed(memory: MemoryIndex, compressor: HashCompressor) -> None:
    read, ahead = 0, []

    def reading() -> Iterator[Document]:
        nonlocal read
        for document in documents(400):
            read += 1
            yield document

    compressor.before = lambda: ahead.append(read - len(compressor.texts) * 2 // 5)
    run(reading(), memory, compressor, batch_tokens=32)
    assert read == 400
    # 2.5 chunks a document; 64 documents in the reader's queue, and windows of 16 batches of 32 tokens
    assert max(ahead) < 150


def test_a_job_that_is_stopped_keeps_what_it_has_and_the_next_one_does_the_rest(memory: MemoryIndex,
                                                                                compressor: HashCompressor) -> None:
    stop = Stop()
    compressor.before = lambda: stop.request() if len(compressor.calls) == 3 else None
    first = run(documents(60), memory, compressor, batch_tokens=32, stop=stop)
    assert first.stopped
    assert 0 < first.added == len(memory) == len(compressor.texts) < 60
    second = run(documents(60), memory, compressor)
    assert second.added == second.chunks - first.added
    assert second.documents == 60
    assert len(compressor.texts) == len(set(compressor.texts)) == second.chunks


def test_a_chunk_that_cannot_be_compressed_is_named_and_the_rest_of_its_batch_is_kept(
        memory: MemoryIndex, compressor: HashCompressor) -> None:
    bad = Document("bad", f"Some {POISON} is in the longest of all of these here.")
    report = run([*documents(5), bad, Document("twin", bad.text)], memory, compressor, on_error="skip")
    assert report.failures == dict.fromkeys(("bad", "twin"), "the text of one of 1 chunks is poison")
    assert report.documents == 5
    with pytest.raises(InputError, match="poison"):
        run([*documents(5, begin=5), bad], memory, compressor, batch_tokens=32)
    assert {f"d{i}" for i in range(5)} < {c.document_id for c in memory.chunks()}  # shorter ones came before


def test_the_old_text_of_a_document_stays_until_the_new_one_is_there(memory: MemoryIndex,
                                                                     compressor: HashCompressor) -> None:
    run([Document("a", "Old words."), Document("b", "Old too.")], memory, compressor)
    report = run([Document("a", f"New {POISON}."), Document("b", "New words.")], memory, compressor, on_error="skip")
    assert (report.removed, report.replaced) == (1, ("a", "b"))
    assert {c.text for c in memory.chunks()} == {"Old words.", "New words."}


def test_progress_ends_at_what_is_in_the_index(memory: MemoryIndex, compressor: HashCompressor) -> None:
    seen: list[Progress] = []
    report = run(documents(20), memory, compressor, progress=seen.append)
    assert (seen[-1].documents, seen[-1].source_tokens) == (20, report.source_tokens)
    assert seen[-1].bytes == memory.stats()["bytes"]
    assert report.write_seconds < report.seconds


def test_a_second_writer_is_refused_by_name_before_it_reads_anything(memory: MemoryIndex,
                                                                     compressor: HashCompressor) -> None:
    def unread() -> Iterator[Document]:
        raise AssertionError
        yield

    with MemoryIndex.open(memory.path) as other:
        other.lock_for_writing()
        with pytest.raises(IndexLockedError, match=f"process id {os.getpid()}"):
            run(unread(), memory, compressor)


def test_batches_of_nothing_are_refused(memory: MemoryIndex, compressor: HashCompressor) -> None:
    with pytest.raises(InputError, match="batches of at least 1 token, got 0"):
        run(documents(1), memory, compressor, batch_tokens=0)


def test_a_lossy_index_gives_a_copy_the_very_codes_of_its_original(tmp_path: Path,
                                                                   compressor: HashCompressor) -> None:
    with MemoryIndex.create(tmp_path / "int8", compressor.spec, vector_size=26, retrieval_encoder="letters",
                            codec="int8") as memory:
        run([Document("a", "The same words."), *documents(30), Document("b", "The same words.")], memory, compressor,
            batch_tokens=32)
        one, two = (memory.get(list(memory.chunk_ids(name)))[0].span for name in ("a", "b"))
        assert torch.equal(one.embeds, two.embeds)  # type: ignore[union-attr]


@pytest.mark.parametrize(("enough", "once"), [(8, False), (10_000, True)])
def test_a_codec_that_learns_is_given_enough_spans_to_learn_from(
        tmp_path: Path, compressor: HashCompressor, monkeypatch: pytest.MonkeyPatch, enough: int, once: bool) -> None:
    monkeypatch.setattr(ledger, "_SHORTEST_PAUSE", 0.0)
    monkeypatch.setattr(ledger, "_WRITE_SHARE", math.inf)
    monkeypatch.setattr(ledger, "_LEARN_FROM", enough)
    seen: list[Progress] = []
    with MemoryIndex.create(tmp_path / "pca", compressor.spec, vector_size=26, retrieval_encoder="letters",
                            codec="pca3") as memory:
        report = run(documents(60), memory, compressor, batch_tokens=32, progress=seen.append)
        assert (report.added, len(memory)) == (report.chunks, report.chunks)
        assert (len(seen) == 1) == once
        assert memory.verify().ok


def test_a_factor_beside_a_target_retention_is_refused_before_anything_is_compressed(memory: MemoryIndex) -> None:
    measuring = MeasuringCompressor(load_trained_compressor("icae", load_frozen("embedded")), 0.9)
    worker = ThreadWorker(SpanWorker(measuring, LetterCounts(), factor=8))
    with pytest.raises(InputError, match=r"the factor 8 and the target retention 0.9 both say how many slots"):
        precompress(documents(1), memory, measuring, worker, factor=8)
