"""After an erasing compaction no file of the folder holds anything of a deleted chunk."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ctxcomp_rag.chunking import Chunk
from ctxcomp_rag.index import MemoryIndex
from ctxcomp_rag.index.vectors import normalised
from ctxcomp_rag.spans import SoftSpan
from tests.index.checks import assert_holds
from tests.index.conftest import SOFT, VECTOR_SIZE, Corpus, data_files, make_corpus

DELETED = range(5, 15)


def corpus_of(count: int, slots: int, words: int) -> Corpus:
    """Spans of `slots` slots; texts long and alike enough for Lance to compress them."""
    corpus = make_corpus(count, seed=3)
    chunks = [replace(c, text=f"{c.text} " + " ".join(f"secret-{i}-{word} of the vault" for word in range(words)))
              for i, c in enumerate(corpus.chunks)]
    spans = [SoftSpan(c.id, 8, torch.arange(slots), slots,
                      torch.randn(slots, 16, generator=torch.Generator().manual_seed(i)))
             for i, c in enumerate(chunks)]
    return Corpus(chunks, spans, corpus.vectors)


def texts_on_disk(path: Path) -> set[str]:
    """All texts in all data files, decoded by Lance file by file: also those that no version mentions any more."""
    from lance.file import LanceFileReader

    return {text for file in data_files(path) if file.suffix == ".lance"
            for text in LanceFileReader(str(file), columns=["text"]).read_all().to_table()["text"].to_pylist()}


def files_with(path: Path, stretches: list[bytes]) -> set[str]:
    files = [p for p in path.rglob("*") if p.is_file()]
    return {file.name for file in files for data in [file.read_bytes()] if any(s in data for s in stretches)}


def bytes_of(chunk: Chunk, span: SoftSpan, vector: np.ndarray) -> list[bytes]:
    """What must not be found: id, text, rows of the span, the vector as given and as it is searched."""
    rows = span.embeds.numpy()
    return [chunk.id.encode(), chunk.text.encode()[:40], rows[0].tobytes(), rows[-1].tobytes(), vector.tobytes(),
            normalised(vector[None])[0].tobytes()]


@pytest.mark.parametrize(("slots", "words"), [(4, 3), (4, 400), (1100, 3)],
                         ids=["small", "compressed texts", "spans in files of their own"])
def test_nothing_of_a_deleted_chunk_is_in_any_file(path: Path, slots: int, words: int) -> None:
    corpus = corpus_of(20, slots, words)
    gone = [bytes_of(corpus.chunks[i], corpus.spans[i], corpus.vectors[i]) for i in DELETED]  # type: ignore[arg-type]
    left = [i for i in range(20) if i not in DELETED]
    rest = Corpus([corpus.chunks[i] for i in left], [corpus.spans[i] for i in left], corpus.vectors[left])
    with MemoryIndex.create(path, SOFT, vector_size=VECTOR_SIZE, retrieval_encoder="e", codec="exact") as index:
        corpus.add_to(index, slice(0, 10))
        corpus.add_to(index, slice(10, 20))
        index.compact()  # the snapshot on disk holds all vectors now
        with MemoryIndex.open(path, read_only=True) as reader:
            assert index.delete(chunk_ids=[corpus.ids[i] for i in DELETED]) == len(DELETED)
            assert all(files_with(path, [stretch]) for s in gone for stretch in s[2:])
            assert texts_on_disk(path) == {c.text for c in corpus.chunks}
            before = {p.name for p in data_files(path)}
            index.compact(erase=True)
            assert files_with(path, [stretch for s in gone for stretch in s]) == set()
            assert texts_on_disk(path) == {c.text for c in rest.chunks}
            assert slots > 1000 or not before & {p.name for p in data_files(path)}
            assert_holds(reader, rest)
        assert_holds(index, rest)


def test_what_a_reader_still_has_open_stays_until_it_is_erased(path: Path) -> None:
    corpus = make_corpus(10)
    secret = corpus.chunks[0].text.encode()
    with MemoryIndex.create(path, SOFT, vector_size=VECTOR_SIZE, retrieval_encoder="e", codec="exact") as index:
        corpus.add_to(index)
        with MemoryIndex.open(path, read_only=True) as reader:
            index.delete(chunk_ids=corpus.ids[:1])
            index.compact()
            assert files_with(path, [secret])
            assert_holds(reader, corpus)
            index.compact(erase=True)
            assert not files_with(path, [secret])
            assert_holds(reader, corpus, slice(1, 10))
