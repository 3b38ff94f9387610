"""Spans as bytes, and the table of rows: what is read is what was written, or an error that says where."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ctxcomp_rag.chunking import Chunk
from ctxcomp_rag.errors import InputError
from ctxcomp_rag.index.rows import Row, metadata_to_json, span_from_bytes, span_to_bytes
from ctxcomp_rag.index.span_store import SpanTable
from ctxcomp_rag.spans import KVSpan, SoftSpan
from tests.index.checks import assert_same_span
from tests.index.conftest import flip_byte, kv_span, make_corpus, soft_span

CHUNK = Chunk("d", "text", 0, 4, 8, {"lang": "en"})


def rows_of(count: int, seed: int = 0) -> list[Row]:
    corpus = make_corpus(count, seed)
    return [Row.make(c, s, v) for c, s, v in zip(corpus.chunks, corpus.spans, corpus.vectors, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_a_span_comes_back_bit_for_bit(dtype: torch.dtype) -> None:
    odd = soft_span(CHUNK, 1, dtype)
    odd.embeds[0, :4] = torch.tensor([float("nan"), float("inf"), -0.0, 1e-40], dtype=dtype)
    assert_same_span(span_from_bytes(span_to_bytes(odd)), odd)
    kv = kv_span(CHUNK, 2, dtype)
    assert_same_span(span_from_bytes(span_to_bytes(kv)), kv)


def test_the_kept_tokens_of_a_kv_span_come_back() -> None:
    kv = kv_span(CHUNK, 2, torch.float32)
    kept = torch.arange(kv.num_slots).expand(kv.num_layers, kv.num_kv_heads, -1)
    back = span_from_bytes(span_to_bytes(replace(kv, kept=kept)))
    assert isinstance(back, KVSpan)
    assert back.kept is not None
    assert back.kept.tolist() == kept.tolist()
    assert back.kept.dtype == torch.int32
    without = span_from_bytes(span_to_bytes(kv))
    assert isinstance(without, KVSpan)
    assert without.kept is None


def test_strided_views_come_back_too() -> None:
    strided = SoftSpan(CHUNK.id, 8, torch.arange(0, 8, 2), 9, torch.randn(16, 4).T)
    assert_same_span(span_from_bytes(span_to_bytes(strided)), strided)
    layers = torch.randn(2, 2, 2, 5, 8).transpose(2, 3)
    kv = KVSpan(CHUNK.id, 8, torch.tensor([0, 1, 2, 4, 5]), 6, layers[0].transpose(1, 2), layers[1].transpose(1, 2))
    assert_same_span(span_from_bytes(span_to_bytes(kv)), kv)


@pytest.mark.parametrize("data", [b"", b"x" * 40, b"\x80\x04pickle", span_to_bytes(soft_span(CHUNK))[:-5]])
def test_other_bytes_are_not_a_span(data: bytes) -> None:
    with pytest.raises(ValueError, match="not a memory span"):
        span_from_bytes(data)


def test_metadata_is_flat() -> None:
    assert metadata_to_json({"b": 1, "a": None, "ü": "é"}, "c") == '{"a": null, "b": 1, "ü": "é"}'
    with pytest.raises(InputError, match=r"'authors': list. Turn it into text"):
        metadata_to_json({"authors": ["x"]}, "c")


def test_the_checksum_covers_every_field() -> None:
    row = rows_of(1)[0]
    others = [
        replace(row, chunk=replace(row.chunk, **change))
        for change in ({"text": "t"}, {"document_id": "x"}, {"start": 1}, {"end": 1}, {"num_tokens": 1})
    ]
    vector = row.vector.copy()
    vector[3] += 1e-3
    others += [replace(row, metadata="{}"), replace(row, vector=vector), replace(row, num_slots=1),
               replace(row, num_source_tokens=1), replace(row, span=row.span[:-1] + b"\x7f")]
    assert len({row.checksum, *(other.checksum for other in others)}) == len(others) + 1


def test_versions_are_snapshots(tmp_path: Path) -> None:
    rows = rows_of(9)
    empty = SpanTable.create(tmp_path / "t", 12)
    first = empty.append(rows[:4], 12)
    second = first.append(rows[4:], 12)
    third = second.delete([second.rows[rows[0].chunk.id]])
    assert [len(t.rows) for t in (empty, first, second, third)] == [0, 4, 9, 8]
    assert [len(t.read_rows(list(t.rows.values()))) for t in (empty, first, second, third)] == [0, 4, 9, 8]
    again = SpanTable.open(tmp_path / "t")
    assert (again.rows, again.documents, again.version) == (third.rows, third.documents, third.version)


def test_row_ids_survive_compaction_and_are_not_given_out_twice(tmp_path: Path) -> None:
    rows = rows_of(6)
    table = SpanTable.create(tmp_path / "t", 12)
    for row in rows:
        table = table.append([row], 12)
    last = table.rows[rows[5].chunk.id]
    table = table.delete([last, table.rows[rows[1].chunk.id]])
    before = dict(table.rows)
    table = table.compact()
    assert table.rows == before
    table = table.append([rows[5]], 12)
    assert table.rows[rows[5].chunk.id] > last
    for row in (rows[0], rows[5]):
        chunk, span, vector = table.read_rows([table.rows[row.chunk.id]])[table.rows[row.chunk.id]]
        assert chunk == row.chunk
        assert span_to_bytes(span) == row.span
        assert vector.tolist() == row.vector.tolist()


def test_the_bytes_are_on_the_disk_before_the_commit_that_names_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[Path] = []
    really = os.fsync

    def fsync(descriptor: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        really(descriptor)

    root = tmp_path / "t"
    table = SpanTable.create(root, 12)
    chunk = make_corpus(1).chunks[0]
    large = SoftSpan(chunk.id, 8, torch.arange(9000), 9000, torch.randn(9000, 16))
    monkeypatch.setattr("os.fsync", fsync)
    commits = {
        "append": lambda t: t.append([*rows_of(4, seed=2), Row.make(chunk, large, np.ones(12, np.float32))], 12),
        "delete": lambda t: t.delete([0, 1]),
        "compact": lambda t: t.compact(),
    }
    for name, commit in commits.items():
        before = {p for p in root.rglob("*") if p.is_file()}
        synced.clear()
        table = commit(table)
        new = {p for p in root.rglob("*") if p.is_file()} - before
        new = {p for p in new if p.suffix in (".lance", ".blob", ".arrow", ".manifest")}
        assert len(new) >= 2, name
        assert new <= set(synced), name
        last = max(i for i, p in enumerate(synced) if p.suffix == ".manifest")
        data = [p for p in new if p.suffix in (".lance", ".blob")]
        assert all(synced.index(p) < synced.index(synced[last]) for p in data), name
        assert {p.parent for p in new} <= set(synced), name


@pytest.mark.parametrize("size", [4, 40_000])
def test_small_and_large_spans(tmp_path: Path, size: int) -> None:
    """Lance keeps spans above 64 KB in files of their own."""
    chunk = make_corpus(1).chunks[0]
    span = SoftSpan(chunk.id, 8, torch.arange(size // 4), size // 4, torch.randn(size // 4, 16))
    row = Row.make(chunk, span, np.ones(12, np.float32))
    table = SpanTable.create(tmp_path / "t", 12).append([row], 12)
    assert any((tmp_path / "t").rglob("*.blob")) == (size > 4)
    (_, found, _), = table.read_rows([0]).values()
    assert_same_span(found, span)
    assert table.totals()["span_bytes"] == len(row.span)


@pytest.mark.filterwarnings("ignore:these data files")
def test_no_flipped_bit_goes_unnoticed(tmp_path: Path) -> None:
    """Whatever byte of a data file is hit: an error, missing rows and a warning, or exactly what was written."""
    rows = rows_of(3)
    table = SpanTable.create(tmp_path / "t", 12).append(rows, 12)
    written = {table.rows[r.chunk.id]: (r.chunk, r.span, r.vector.tolist()) for r in rows}
    (file,) = (tmp_path / "t" / "data").glob("*.lance")
    whole = file.read_bytes()
    noticed = 0
    for offset in np.random.default_rng(0).permutation(len(whole))[:100]:
        flip_byte(file, int(offset))
        try:
            opened = SpanTable.open(tmp_path / "t")
            found = opened.read_rows(sorted(written))
        except Exception:
            noticed += 1
        else:
            held = {k: (c, span_to_bytes(s), v.tolist()) for k, (c, s, v) in found.items()}
            assert held == ({} if opened.unreadable else written), offset
            noticed += bool(opened.unreadable)
        file.write_bytes(whole)
    assert noticed > 40
