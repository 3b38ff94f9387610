"""Rows that are asked for again come from memory, all but their spans; nothing is trusted for it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pytest
from cachetools import LRUCache

from ctxcomp_rag.errors import IndexDamagedError
from ctxcomp_rag.index import MemoryIndex
from ctxcomp_rag.index.read_cache import ReadCache
from ctxcomp_rag.index.rows import Row, checked_bytes
from ctxcomp_rag.index.span_store import SpanTable
from ctxcomp_rag.index.stored_rows import StoredRows
from ctxcomp_rag.index.table_reader import ROWS_PER_READ
from tests.index.conftest import SOFT, VECTOR_SIZE, data_files, flip_byte, make_corpus


class _Counted:
    """A dataset that remembers which rows were taken from it."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset
        self.taken: list[list[int]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._dataset, name)

    def _take_rows(self, row_ids: list[int], columns: list[str]) -> Any:
        self.taken.append(row_ids)
        return self._dataset._take_rows(row_ids, columns)


def stored(tmp_path: Path, count: int) -> tuple[dict[int, Row], _Counted]:
    corpus = make_corpus(count)
    rows = [Row.make(c, s, v) for c, s, v in zip(corpus.chunks, corpus.spans, corpus.vectors, strict=True)]
    table = SpanTable.create(tmp_path / "spans.lance", VECTOR_SIZE).append(rows, VECTOR_SIZE)
    return {table.rows[row.chunk.id]: row for row in rows}, _Counted(lance.dataset(str(table.path)))


def assert_reads(reader: StoredRows, row_ids: Sequence[int], written: dict[int, Row]) -> None:
    found = {columns["_rowid"]: checked_bytes(columns, vector) for columns, vector in reader.read(row_ids)}
    assert found.keys() == set(row_ids)
    for row_id, row in found.items():
        assert (row.chunk, row.metadata) == (written[row_id].chunk, written[row_id].metadata)
        assert bytes(row.span) == written[row_id].span
        np.testing.assert_array_equal(row.vector, written[row_id].vector)


def test_a_row_is_taken_from_the_table_once(tmp_path: Path) -> None:
    written, dataset = stored(tmp_path, 6)
    reader, ids = StoredRows(dataset), list(written)
    assert_reads(reader, ids[:3], written)
    assert_reads(reader, ids[2:5], written)
    assert_reads(reader, ids[:5], written)
    assert dataset.taken == [ids[:3], ids[3:5]]


def test_reading_every_row_leaves_the_memory_to_queries(tmp_path: Path) -> None:
    written, dataset = stored(tmp_path, ROWS_PER_READ + 6)
    reader, ids = StoredRows(dataset), list(written)
    assert_reads(reader, ids, written)
    assert_reads(reader, ids, written)
    assert dataset.taken == 2 * [ids[:ROWS_PER_READ], ids[ROWS_PER_READ:]]


def test_rows_that_are_not_there_are_left_out(tmp_path: Path) -> None:
    written, dataset = stored(tmp_path, 2)
    reader = StoredRows(dataset)
    for _ in range(2):
        assert [columns["_rowid"] for columns, _ in reader.read([999, next(iter(written))])] == [next(iter(written))]
        assert list(reader.read([999])) == []


@pytest.mark.parametrize("column", ["span", "text"])
def test_what_changes_on_the_disk_after_a_row_was_read_is_found(path: Path, column: str) -> None:
    corpus = make_corpus(5)
    with MemoryIndex.create(path, SOFT, vector_size=VECTOR_SIZE, retrieval_encoder="e", codec="exact") as index:
        corpus.add_to(index)
        chunk, span = corpus.chunks[3], index.get([corpus.ids[3]])[0].span
        (file,) = data_files(path)
        bytes_of = {"span": span.embeds.numpy().tobytes(), "text": chunk.text.encode()}
        flip_byte(file, file.read_bytes().index(bytes_of[column]))
        if column == "span":
            with pytest.raises(IndexDamagedError, match=rf"chunk '{corpus.ids[3]}' .* do not match their checksum"):
                index.get([corpus.ids[3]])
        assert [damage.chunk_id for damage in index.verify().damaged] == [corpus.ids[3]]


def test_a_row_that_was_damaged_is_read_anew_once_its_file_is_put_back(path: Path) -> None:
    corpus = make_corpus(5)
    with MemoryIndex.create(path, SOFT, vector_size=VECTOR_SIZE, retrieval_encoder="e", codec="exact") as index:
        corpus.add_to(index)
        (file,) = data_files(path)
        at = file.read_bytes().index(corpus.chunks[3].text.encode())
        flip_byte(file, at)
        with pytest.raises(IndexDamagedError, match=rf"chunk '{corpus.ids[3]}'"):
            index.get([corpus.ids[3]])
        flip_byte(file, at)
        assert index.get([corpus.ids[3]])[0].chunk.text == corpus.chunks[3].text


def test_nobody_can_change_a_vector_that_others_will_be_given(tmp_path: Path) -> None:
    written, dataset = stored(tmp_path, 1)
    ((_, vector),) = StoredRows(dataset).read(list(written))
    with pytest.raises(ValueError, match="read-only"):
        vector *= 2


def test_a_cache_fetches_what_it_misses_at_once_and_stays_within_its_limit() -> None:
    asked: list[list[int]] = []

    def fetch(keys: Sequence[int]) -> dict[int, str]:
        asked.append(list(keys))
        return {key: str(key) for key in keys if key >= 0}

    cache: ReadCache[int, str] = ReadCache(fetch, LRUCache(2))
    assert cache.read([1, 2, 1, -1]) == {1: "1", 2: "2"}
    assert cache.read([2, 3]) == {2: "2", 3: "3"}
    assert cache.read([3, 2]) == {2: "2", 3: "3"}
    assert cache.read([1]) == {1: "1"}
    cache.forget([1])
    assert cache.read([1]) == {1: "1"}
    assert asked == [[1, 2, -1], [3], [1], [1]]
    assert cache._kept.currsize == 2
