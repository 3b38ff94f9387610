"""Flipped bits in every kind of file are found or harmless. `make kill-tests` flips a thousand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ctxcomp_rag.index import MemoryIndex
from tests.index.conftest import flip_byte
from tests.index.flips import (
    DELETED,
    corpus_with_large_spans,
    files_by_kind,
    flip_bits,
    make_index_of_every_file_kind,
    place_of_the_deleted_row,
)


def test_no_flipped_bit_in_any_file_gives_a_wrong_span(path: Path) -> None:
    make_index_of_every_file_kind(path)
    kinds = files_by_kind(path)
    assert set(kinds) == {"CURRENT.json", "checksums.json", "delimiters.safetensors", "faiss", "index.json",
                          "writer.lock",
                          "_deletions/*.arrow", "_transactions/*.txn", "_versions/*.json", "_versions/*.manifest",
                          "data/*.blob", "data/*.lance"}
    report = flip_bits(path, 4 * len(kinds), seed=5)
    assert report.complaints == []
    assert report.flips == 4 * len(kinds)
    assert report.outcomes["data/*.blob"] == {"named": 4}


@pytest.mark.parametrize("bit", [0, 3])
def test_a_deleted_chunk_does_not_come_back_when_the_list_of_deletions_is_altered(path: Path, bit: int) -> None:
    """Row 2 becomes row 3 or row 10 in the list, which Lance itself believes."""
    make_index_of_every_file_kind(path)
    file, offset = place_of_the_deleted_row(path)
    flip_byte(file, offset, bit)
    corpus = corpus_with_large_spans()
    with pytest.warns(UserWarning, match=f"_deletions/{file.name} is not what was written"):
        index = MemoryIndex.open(path)
    with index:
        assert [c.id for c in index.chunks()] == [corpus.ids[i] for i in range(10, 20) if i not in DELETED]
        assert [file.name in d.reason for d in index.verify().damaged] == [True]
        assert index.intact_texts_of_unreadable_files() == {}
        # the way out: compress what is missing, give up the file
        corpus.add_to(index, slice(0, 10))
        index.compact(drop_unreadable=True)
        assert (len(index), index.verify().ok) == (19, True)


def test_a_manifest_that_names_another_column_is_passed_over(path: Path) -> None:
    """Lance opens it, and then finds no `document_id`."""
    make_index_of_every_file_kind(path)
    manifest = min((path / "spans.lance" / "_versions").glob("*.manifest"))
    flip_byte(manifest, manifest.read_bytes().rindex(b"document_id"), 0)
    corpus = corpus_with_large_spans()
    with pytest.warns(UserWarning, match=f"{manifest.name} cannot be read"):
        index = MemoryIndex.open(path)
    with index:
        assert len(index) == 20  # as before the last change, the deletion
        assert [d.reason for d in index.verify().damaged] == [
            f"{manifest.name} cannot be read: the last change of the index is missing"]
        index.delete(chunk_ids=[corpus.ids[i] for i in DELETED])
        assert (len(index), index.verify().ok) == (18, True)


@pytest.mark.parametrize("harm", ["missing", "torn", "altered"])
def test_a_list_of_checksums_that_is_not_whole_accuses_nobody(path: Path, harm: str) -> None:
    make_index_of_every_file_kind(path)
    checksums = path / "spans.lance" / "checksums.json"
    whole = checksums.read_text()
    if harm == "missing":
        checksums.unlink()
    else:
        checksums.write_text(whole[:40] if harm == "torn" else whole.replace("3", "4"))
    corpus = corpus_with_large_spans()
    with MemoryIndex.open(path) as index:
        assert (len(index), index.verify().ok) == (18, True)
        index.delete(chunk_ids=corpus.ids[:1])
    assert set(json.loads(checksums.read_text())["files"]) >= set(json.loads(whole)["files"])
