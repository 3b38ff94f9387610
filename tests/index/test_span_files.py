"""Spans read from the table's own files are those that Lance reads; large ones are mapped."""

from __future__ import annotations

import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pytest
import torch

from ctxcomp_rag.index.rows import Row
from ctxcomp_rag.index.span_files import SpanFiles, stretch
from ctxcomp_rag.index.span_store import SpanTable
from ctxcomp_rag.spans import KVSpan, SoftSpan
from tests.index.conftest import VECTOR_SIZE, data_files, make_corpus

SIZES = (4, 900, 1100, 70000)  # slots of 64 bytes: in the data file, almost too large for it, with others, alone


def rows_of(count: int, seed: int) -> list[Row]:
    """Spans of all sizes, dealt out in turn."""
    corpus = make_corpus(count, seed)
    spans = [SoftSpan(c.id, c.num_tokens, torch.arange(slots), slots, torch.full((slots, 16), float(i)))
             for i, c in enumerate(corpus.chunks) for slots in [SIZES[i % 4]]]
    return [Row.make(c, s, v) for c, s, v in zip(corpus.chunks, spans, corpus.vectors, strict=True)]


def spans_by_lance(table: SpanTable) -> dict[int, bytes]:
    """Row id -> bytes, all in one scan."""
    scanner = lance.dataset(str(table.path), version=table.version).scanner(
        columns=["span"], with_row_id=True, blob_handling="all_binary")
    return {row["_rowid"]: row["span"] for row in scanner.to_table().to_pylist()}


def spans_by_files(table: SpanTable) -> tuple[dict[int, bytes], set[int]]:
    """(row id -> bytes, kinds of blobs), by files alone."""
    dataset = _WithoutBlobs(lance.dataset(str(table.path), version=table.version))
    taken = dataset.scanner(columns=["span"], with_row_id=True, with_row_address=True).to_table()
    places = taken["span"].to_pylist()
    found = SpanFiles(dataset).read(taken["_rowaddr"].to_pylist(), places)
    return (dict(zip(taken["_rowid"].to_pylist(), map(bytes, found), strict=True)), {p["kind"] for p in places})


class _WithoutBlobs:
    """A dataset that reads no blobs."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __getattr__(self, name: str) -> Any:
        assert name != "read_blobs", "Lance was asked for a span"
        return getattr(self._dataset, name)


def test_spans_of_every_size_are_where_lance_says_through_deletion_and_compaction(tmp_path: Path) -> None:
    table = SpanTable.create(tmp_path / "spans.lance", VECTOR_SIZE)
    for seed in range(2):
        table = table.append(rows_of(9, seed), VECTOR_SIZE)
    deleted = table.delete(list(table.rows.values())[::5])
    compacted = deleted.compact()
    for version, count in ((table, 18), (deleted, 14), (compacted, 14)):
        found, kinds = spans_by_files(version)
        assert found == spans_by_lance(version)
        assert (len(found), kinds) == (count, {0, 1, 2})
        read = version.read_rows(list(version.rows.values()))
        assert {c.id for c, _, _ in read.values()} == set(version.rows)


@pytest.mark.parametrize("size", [10, 2**16 - 1, 2**16, 3 * 2**16 + 5])
@pytest.mark.parametrize("begin", [0, 1, 4095, 4096, 100_001])
def test_a_stretch_of_a_file_is_what_lies_there(tmp_path: Path, begin: int, size: int) -> None:
    data = np.random.default_rng(0).bytes(begin + size + 3)
    (tmp_path / "f").write_bytes(data)
    found = stretch(tmp_path / "f", begin, size)
    assert bytes(found) == data[begin : begin + size]
    assert isinstance(found, memoryview) == (size >= 2**16)


@pytest.mark.parametrize("size", [10, 2**17])
def test_a_file_that_is_shorter_or_not_there_raises(tmp_path: Path, size: int) -> None:
    (tmp_path / "f").write_bytes(b"x" * (size - 1))
    with pytest.raises(ValueError, match=r"expected 10 bytes at 0|mmap length is greater than file size"):
        stretch(tmp_path / "f", 0, size)
    with pytest.raises(FileNotFoundError):
        stretch(tmp_path / "g", 0, size)


def test_a_large_span_lies_over_its_file_until_it_is_let_go_and_is_not_written_through(tmp_path: Path) -> None:
    table = SpanTable.create(tmp_path / "spans.lance", VECTOR_SIZE)
    corpus = make_corpus(2)
    keys, values = torch.randn(2, 2, 2, 900, 8)
    spans = [KVSpan(c.id, 900, torch.arange(900), 900, keys, values) for c in corpus.chunks]
    table = table.append([Row.make(c, s, v) for c, s, v in zip(corpus.chunks, spans, corpus.vectors, strict=True)],
                         VECTOR_SIZE)
    (first, second) = (span for _, span, _ in table.read_rows([0, 1]).values())
    assert isinstance(first, KVSpan)
    assert isinstance(second, KVSpan)
    on_disk = [file.read_bytes() for file in data_files(tmp_path)]
    first.keys.zero_()
    assert [file.read_bytes() for file in data_files(tmp_path)] == on_disk
    (again,) = (span for _, span, _ in table.read_rows([0]).values())
    assert isinstance(again, KVSpan)
    assert again.keys.equal(keys)
    table.delete([1]).compact().remove_old_versions()  # the files of the first version are gone
    assert second.keys.equal(keys)
    assert second.values.equal(values)


def test_a_span_whose_file_is_gone_is_refused_by_lance(tmp_path: Path) -> None:
    table = SpanTable.create(tmp_path / "spans.lance", VECTOR_SIZE).append(rows_of(4, 0), VECTOR_SIZE)
    for file in (tmp_path / "spans.lance" / "data").rglob("*.blob"):
        file.unlink()
    assert len(table.read_rows([0, 1])) == 2
    with pytest.raises((OSError, ValueError), match="Not found"):
        table.read_rows([0, 1, 2])


def test_checksums_are_those_of_zlib() -> None:
    row = rows_of(1, 0)[0]
    assert row.checksum == zlib.crc32(row.span, zlib.crc32(row.vector.tobytes(), row.text_crc))
    longer = replace(row, span=row.span * 50)
    assert longer.checksum == zlib.crc32(longer.span, zlib.crc32(row.vector.tobytes(), row.text_crc))
