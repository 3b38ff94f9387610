"""An index in an object store: as exact as in a folder, one round of requests a query, damage named."""

from __future__ import annotations

import random
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ctxcomp_rag.errors import IndexDamagedError, IndexFolderError, IndexUnreachableError, InputError
from ctxcomp_rag.index import MemoryIndex, object_store
from ctxcomp_rag.index.remote_table import RemoteTable
from ctxcomp_rag.index.span_cache import Place, SpanCache
from ctxcomp_rag.spans import SoftSpan
from tests.index.checks import QUERIES, assert_holds, assert_same_span
from tests.index.conftest import SOFT, VECTOR_SIZE, Corpus, make_corpus
from tests.index.flips import corpus_with_large_spans, look, make_index_of_every_file_kind
from tests.index.s3 import S3Server

CORPUS = make_corpus(40)
DATA = "spans.lance/data/"


@pytest.fixture
def published(index: MemoryIndex, uri: str) -> str:
    CORPUS.add_to(index, slice(0, 25))
    CORPUS.add_to(index, slice(25, 40))
    index.push(uri)
    return uri


def damage(bucket: Any, part: str, needle: bytes) -> str:
    """Flip a bit where `needle` lies in the object with `part` in its name; returns the name."""
    for entry in bucket.objects.all():
        data = entry.get()["Body"].read()
        if part in entry.key and needle in data:
            at = data.index(needle) + len(needle) // 2
            entry.put(Body=data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
            return str(entry.key)
    raise AssertionError(f"{needle!r} is nowhere")


# ---- the same index --------------------------------------------------------------------------------------------


def test_a_published_index_holds_what_was_pushed_bit_for_bit(published: str) -> None:
    with MemoryIndex.open(published) as index:
        assert (index.location, index.codec, index.spec.fingerprint) == (published, "exact", SOFT.fingerprint)
        assert_holds(index, CORPUS)
        assert index.document_chunks("d1") == [c.id for c in CORPUS.chunks if c.document_id == "d1"]
        assert index.chunks_of_texts([CORPUS.chunks[7].text, "nowhere"]) == [CORPUS.ids[7], None]


def test_every_way_of_asking_gets_the_answer_of_the_folder(index: MemoryIndex, published: str) -> None:
    with MemoryIndex.open(published) as remote:
        for where in (None, {"lang": "de"}, {"document_id": ["d1", "d3"], "year": 2001}):
            here, there = (i.search(QUERIES, 5, where=where) for i in (index, remote))
            assert [[(r.chunk, r.score) for r in row] for row in there] == \
                   [[(r.chunk, r.score) for r in row] for row in here]
            assert remote.search_chunks(QUERIES, 5, where=where) == index.search_chunks(QUERIES, 5, where=where)
        np.testing.assert_array_equal(remote.vectors(CORPUS.ids), index.vectors(CORPUS.ids))
        assert remote.stored(CORPUS.ids[:3]) == index.stored(CORPUS.ids[:3])
        same = ("chunks", "documents", "span_bytes", "text_bytes", "source_tokens", "slots")
        assert {k: remote.stats()[k] for k in same} == {k: index.stats()[k] for k in same}


def test_the_locator_finds_small_large_and_huge_spans_where_lance_does(tmp_path: Path, uri: str, s3: S3Server) -> None:
    chunks = make_corpus(5).chunks
    sizes = (4, 1_500, 90_000, 1_600, 5)  # in the data file, together in a file beside it, alone in one
    spans = [SoftSpan(c.id, 8, torch.arange(n), n, torch.randn(n, 16)) for c, n in zip(chunks, sizes, strict=True)]
    corpus = Corpus(chunks, spans, make_corpus(5).vectors)
    with MemoryIndex.create(tmp_path / "kb", SOFT, vector_size=VECTOR_SIZE, retrieval_encoder="minilm",
                            codec="exact") as index:
        corpus.add_to(index)
        index.push(uri)
        assert index.push(uri).uploaded == 0  # the largest went in parts
    table = RemoteTable.open(uri)
    rows = list(table.rows.values())
    s3.forget()
    found = table.read_rows(rows)
    requested = s3.gets(DATA)
    oracle = table.uncached().read_rows(rows)
    for span, row in zip(spans, rows, strict=True):
        assert_same_span(found[row][1], span)
        assert_same_span(oracle[row][1], span)
    assert len(requested) == 5
    assert {r.name for r in requested if r.bytes} == {f"kb/{n}" for n in table._found.publication.files if DATA in n}


def test_spans_of_a_codec_that_learns_are_read_with_its_tables(tmp_path: Path, uri: str) -> None:
    corpus = make_corpus(260)
    with MemoryIndex.create(tmp_path / "kb", SOFT, vector_size=VECTOR_SIZE, retrieval_encoder="minilm",
                            codec="pq4") as index:
        corpus.add_to(index)
        index.push(uri)
        expected = index.get(corpus.ids)
    with MemoryIndex.open(uri) as remote:
        for found, stored in zip(remote.get(corpus.ids), expected, strict=True):
            assert_same_span(found.span, stored.span)


def test_an_index_without_chunks_can_be_published(index: MemoryIndex, uri: str) -> None:
    index.push(uri)
    with MemoryIndex.open(uri) as remote:
        assert_holds(remote, make_corpus(0))


# ---- requests --------------------------------------------------------------------------------------------------


def test_a_query_costs_one_round_of_one_request_a_span_and_the_second_none(s3: S3Server, published: str) -> None:
    with MemoryIndex.open(published) as index:
        s3.forget()
        # the server answers none of the five before all of them have been made
        with s3.together(5, lambda request: DATA in request.name):
            (first,) = index.search(QUERIES[0], 5)
        assert len(s3.requests) == len(s3.gets(DATA)) == len({(r.name, r.bytes) for r in s3.requests}) == 5
        s3.forget()
        (second,) = index.search(QUERIES[0], 5)
        assert s3.requests == []
    for a, b in zip(first, second, strict=True):
        assert (a.chunk, a.score) == (b.chunk, b.score)
        assert_same_span(a.span, b.span)


def test_texts_vectors_and_filters_cost_no_request(s3: S3Server, published: str) -> None:
    with MemoryIndex.open(published) as index:
        s3.forget()
        index.search_chunks(QUERIES, 5, where={"lang": "de"})
        index.vectors(CORPUS.ids)
        index.stats()
        list(index.chunks())
        assert s3.requests == []


def test_opening_what_was_open_before_costs_one_request(s3: S3Server, published: str) -> None:
    MemoryIndex.open(published).close()
    s3.forget()
    with MemoryIndex.open(published) as index:
        assert [(r.method, r.name) for r in s3.requests] == [("GET", "kb/index.json")]
        s3.forget()
        index.refresh()
        assert [(r.method, r.name) for r in s3.requests] == [("HEAD", "kb/index.json")]
        assert_holds(index, CORPUS)


def test_the_span_cache_stays_within_its_bytes_and_keeps_what_is_read_often() -> None:
    asked: list[Place] = []

    def fetch(place: Place) -> bytes:
        asked.append(place)
        return bytes(place.size)

    cache, often = SpanCache(fetch, max_bytes=100), Place("often", 0, 40)
    for i in range(20):
        assert [len(b) for b in cache.read([often, Place("once", i, 40), often])] == [40, 40, 40]
    assert asked.count(often) == 1
    assert len(asked) == 21
    cache.forget([often])
    assert len(cache.read([often, Place("too large", 0, 101)])[1]) == 101
    assert cache._cache._kept.currsize <= 100
    cache.read([Place("too large", 0, 101)])
    assert [p.object for p in asked[21:]] == ["often", "too large", "too large"]


# ---- new versions ----------------------------------------------------------------------------------------------


def test_a_reader_keeps_its_version_until_it_refreshes(index: MemoryIndex, published: str, s3: S3Server) -> None:
    with MemoryIndex.open(published) as remote:
        version = remote.version
        index.delete(chunk_ids=CORPUS.ids[:10])
        index.push(published)
        assert_same_span(remote.get([CORPUS.ids[0]])[0].span, CORPUS.spans[0])
        assert (len(remote), remote.version) == (40, version)
        s3.forget()
        remote.refresh()
        assert not s3.gets(DATA)  # a deletion brings no rows
        assert remote.version == index.version > version
        assert_holds(remote, CORPUS, slice(10, 40))
    with MemoryIndex.open(published) as again:
        assert_holds(again, CORPUS, slice(10, 40))


def test_a_reader_whose_files_are_gone_moves_on_to_the_new_version(index: MemoryIndex, published: str) -> None:
    with MemoryIndex.open(published) as remote:
        index.delete(chunk_ids=CORPUS.ids[:10])
        index.compact(erase=True)
        index.push(published)
        assert_same_span(remote.get([CORPUS.ids[20]])[0].span, CORPUS.spans[20])
        assert remote.version == index.version
        with pytest.raises(InputError, match="expected ids of chunks in s3://"):
            remote.get([CORPUS.ids[0]])


def test_what_is_kept_of_old_versions_is_removed_once_nobody_reads_them(index: MemoryIndex, published: str,
                                                                        tmp_path: Path) -> None:
    MemoryIndex.open(published).close()
    index.delete(chunk_ids=CORPUS.ids[:10])
    index.compact()
    index.push(published)
    MemoryIndex.open(published).close()
    (kept,) = (tmp_path / "cache").iterdir()
    assert [p.name for p in kept.iterdir() if p.name.isdigit()] == [str(index.version)]
    assert len(list((kept / "rows").iterdir())) == 1


# ---- what can go wrong -----------------------------------------------------------------------------------------


def test_a_flipped_byte_of_a_span_names_the_chunk_and_pushing_again_mends_it(
        index: MemoryIndex, published: str, bucket: Any) -> None:
    span = CORPUS.spans[3]
    assert isinstance(span, SoftSpan)
    damage(bucket, DATA, span.embeds.numpy().tobytes())
    with MemoryIndex.open(published) as remote:
        with pytest.raises(IndexDamagedError, match=rf"chunk '{CORPUS.ids[3]}' of document 'd3' .* ctxcomp push DIR "
                                                    f"{published}"):
            remote.get([CORPUS.ids[3]])
        assert_same_span(remote.get([CORPUS.ids[4]])[0].span, CORPUS.spans[4])
        report = remote.verify()
        assert [d.chunk_id for d in report.damaged] == [CORPUS.ids[3]]
    assert index.push(published).uploaded == 1
    with MemoryIndex.open(published) as remote:
        assert_holds(remote, CORPUS)


def test_a_flipped_byte_of_a_vector_or_of_the_manifest_is_found(published: str, bucket: Any) -> None:
    damage(bucket, DATA, CORPUS.vectors[3].tobytes())
    with MemoryIndex.open(published) as remote, pytest.raises(IndexDamagedError, match=CORPUS.ids[3]):
        remote.search(CORPUS.vectors[3], 40)
    damage(bucket, "_versions", b"chunk_id")
    shutil.rmtree(remote.path)
    with pytest.raises(IndexDamagedError, match=r"_versions/\d+.manifest in s3://.* is not what was published"):
        MemoryIndex.open(published)


def test_damage_of_what_is_kept_here_is_mended_from_the_store(published: str, tmp_path: Path) -> None:
    with MemoryIndex.open(published) as index:
        for file in (index.path / "rows").iterdir():
            data = file.read_bytes()
            at = data.find(CORPUS.vectors[3].tobytes())
            if at >= 0:
                file.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    with MemoryIndex.open(published) as index, pytest.warns(UserWarning, match="they were read anew"):
        assert_same_span(index.get([CORPUS.ids[3]])[0].span, CORPUS.spans[3])
    with MemoryIndex.open(published) as index:
        assert_holds(index, CORPUS)
        for file in (*(index.path / "rows").iterdir(), *index.path.glob("[0-9]*/delimiters*")):
            file.write_bytes(b"torn")
    with MemoryIndex.open(published) as index:
        assert_holds(index, CORPUS)


def test_an_object_that_somebody_removed_is_named(published: str, bucket: Any) -> None:
    bucket.Object("kb/delimiters.safetensors").delete()
    with pytest.raises(IndexDamagedError, match=r"kb/delimiters.safetensors is missing, .* ctxcomp push DIR"):
        MemoryIndex.open(published)


def test_a_published_index_is_changed_where_it_was_pushed_from(published: str) -> None:
    with MemoryIndex.open(published) as index:
        for change in (lambda: CORPUS.add_to(index), lambda: index.delete(chunk_ids=CORPUS.ids[:1]), index.compact,
                       index.lock_for_writing, lambda: index.push("s3://elsewhere/kb")):
            with pytest.raises(IndexFolderError, match=rf"{published} can only be read. .* ctxcomp push DIR"):
                change()
    with pytest.raises(InputError, match=r"expected a folder of this machine .* ctxcomp push DIR s3://lake/new"):
        MemoryIndex.create("s3://lake/new", SOFT, vector_size=VECTOR_SIZE, retrieval_encoder="minilm")


def test_an_index_json_that_is_torn_or_was_copied_is_not_opened(published: str, bucket: Any, index: MemoryIndex
                                                                 ) -> None:
    bucket.put_object(Key="kb/index.json", Body=b"{torn")
    with pytest.raises(IndexDamagedError, match=r"index.json in s3://.* cannot be read"):
        MemoryIndex.open(published)
    bucket.put_object(Key="kb/index.json", Body=(index.path / "index.json").read_bytes())
    with pytest.raises(IndexFolderError, match=r"a folder was copied there. Push it into an empty prefix"):
        MemoryIndex.open(published)


def test_without_a_place_to_keep_rows_it_says_which_variable_to_set(published: str, tmp_path: Path,
                                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CTXCOMP_CACHE", str(tmp_path / "file"))
    with pytest.raises(IndexFolderError, match=r"expected to be able to keep texts and vectors .* set CTXCOMP_CACHE"):
        MemoryIndex.open(published)


def test_what_cannot_be_opened_says_why(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(IndexFolderError, match=rf"no index.json. .* ctxcomp push DIR {uri}"):
        MemoryIndex.open(uri)
    with pytest.raises(IndexFolderError, match="expected a bucket 'no-such-bucket'"):
        MemoryIndex.open("s3://no-such-bucket/kb")
    with pytest.raises(InputError, match="expected s3://BUCKET/PREFIX, got 's3://'"):
        MemoryIndex.open("s3://")
    with monkeypatch.context() as patch:
        patch.delenv("AWS_ACCESS_KEY_ID")
        patch.delenv("AWS_SECRET_ACCESS_KEY")
        with pytest.raises(IndexUnreachableError, match=r"expected credentials .* Set AWS_ACCESS_KEY_ID"):
            MemoryIndex.open(uri)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(IndexUnreachableError, match=r"expected an answer .* Check AWS_ENDPOINT_URL"):
        MemoryIndex.open(uri)


def test_a_store_that_refuses_or_stops_answering_is_not_taken_for_damage(
        published: str, s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    with MemoryIndex.open(published) as index, s3.refusing(lambda request: DATA in request.name), \
            pytest.raises(IndexUnreachableError, match="access was denied"):
        index.get(CORPUS.ids[:1])
    monkeypatch.setattr(object_store, "_ANSWER", 1)
    monkeypatch.setattr(object_store, "_RETRY", 1)
    with MemoryIndex.open(published) as index, s3.silent_to(lambda request: DATA in request.name), \
            pytest.raises(IndexUnreachableError, match="expected an answer"):
        index.get(CORPUS.ids[:1])
    with s3.silent_to(lambda request: True), pytest.raises(IndexUnreachableError, match="expected an answer"):
        MemoryIndex.open(published)


def test_verify_of_a_store_that_refuses_names_no_chunk_as_damaged(published: str, s3: S3Server) -> None:
    with MemoryIndex.open(published) as index:
        with s3.refusing(lambda request: DATA in request.name), \
                pytest.raises(IndexUnreachableError, match="access was denied"):
            index.verify()
        assert index.verify().ok


def test_without_obstore_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    with pytest.raises(InputError, match=r"pip install 'ctxcomp-rag\[s3\]'"):
        MemoryIndex.open("s3://lake/kb")


def test_no_flipped_bit_in_any_object_gives_a_wrong_span(tmp_path: Path, uri: str, bucket: Any,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    make_index_of_every_file_kind(tmp_path / "kb")
    with MemoryIndex.open(tmp_path / "kb") as index:
        index.push(uri)
    corpus, rng = corpus_with_large_spans(), random.Random(4)
    outcomes: Counter[str] = Counter()
    for i, entry in enumerate(bucket.objects.all()):
        whole = entry.get()["Body"].read()
        at, bit = rng.randrange(len(whole)), rng.randrange(8)
        entry.put(Body=whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :])
        monkeypatch.setenv("CTXCOMP_CACHE", str(tmp_path / f"cache-{i}"))
        outcome, why = look(uri, corpus)
        assert outcome != "wrong", f"{entry.key} byte {at} bit {bit}: {why}"
        outcomes[outcome] += 1
        entry.put(Body=whole)
    assert outcomes["refused"] + outcomes["named"] >= 5
