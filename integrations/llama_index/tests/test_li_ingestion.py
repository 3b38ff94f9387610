"""SpanPrecompress in an IngestionPipeline: every node has a span afterwards, whatever was cached, changed or lost."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from li_setup import CORPUS, Setup, node
from llama_index.core import Document, MockEmbedding
from llama_index.core.ingestion import IngestionCache, IngestionPipeline
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.schema import BaseNode, ImageNode, NodeWithScore
from llama_index.core.storage.docstore import SimpleDocumentStore
from llama_index.core.vector_stores import SimpleVectorStore

from ctxcomp_rag import InputError, MemoryIndex, SpanChat
from llama_index_ctxcomp import SpanNode, SpanPostprocessor, SpanPrecompress, SpanVectorStore

DOCUMENTS = [Document(text=d.text, id_=d.id) for d in CORPUS[:3]]


@pytest.fixture
def index(setup: Setup, tmp_path: Path) -> Iterator[MemoryIndex]:
    with MemoryIndex.create(tmp_path / "kb", setup.compressor.spec, vector_size=8, retrieval_encoder="mock") as made:
        yield made


def pipeline(step: SpanPrecompress, **more: object) -> IngestionPipeline:
    return IngestionPipeline(transformations=[SentenceSplitter(chunk_size=64, chunk_overlap=0),
                                              MockEmbedding(embed_dim=8), step], **more)  # type: ignore[arg-type]


def with_spans(setup: Setup, index: MemoryIndex, nodes: Sequence[BaseNode]) -> int:
    found = SpanPostprocessor(SpanChat(setup.rag.backbone, index)).postprocess_nodes(
        [NodeWithScore(node=n) for n in nodes])
    return sum(isinstance(f.node, SpanNode) for f in found)


def test_nodes_behind_another_store_have_their_spans(setup: Setup, index: MemoryIndex) -> None:
    nodes = pipeline(SpanPrecompress(index, setup.compressor), vector_store=SimpleVectorStore()).run(
        documents=DOCUMENTS)
    assert len(nodes) > 3
    assert len(index) == with_spans(setup, index, nodes) == len(nodes)


async def test_a_cache_hit_keeps_spans_and_a_lost_span_is_no_hit(setup: Setup, index: MemoryIndex) -> None:
    run = pipeline(SpanPrecompress(index, setup.compressor), cache=IngestionCache())
    nodes = run.run(documents=DOCUMENTS)
    made = index.version
    for _ in range(2):
        nodes = await run.arun(documents=DOCUMENTS)
        assert (index.version, with_spans(setup, index, nodes)) == (made, len(nodes))
    index.delete(document_ids=[DOCUMENTS[0].id_])
    nodes = run.run(documents=DOCUMENTS)
    assert with_spans(setup, index, nodes) == len(nodes)
    index.delete(document_ids=[d.id_ for d in DOCUMENTS])
    nodes = run.run(documents=DOCUMENTS)
    assert with_spans(setup, index, nodes) == len(nodes)


def test_a_folder_made_anew_is_filled_again(setup: Setup, tmp_path: Path) -> None:
    cache = IngestionCache()
    for _ in range(2):
        with MemoryIndex.create(tmp_path / "kb", setup.compressor.spec, vector_size=8, retrieval_encoder="m") as index:
            nodes = pipeline(SpanPrecompress(index, setup.compressor), cache=cache).run(documents=DOCUMENTS)
            assert with_spans(setup, index, nodes) == len(nodes)
        shutil.rmtree(tmp_path / "kb")


def test_the_cache_knows_compressor_factor_and_folder(setup: Setup, index: MemoryIndex) -> None:
    four, eight = (SpanPrecompress(index, setup.compressor, compression_factor=f).to_dict() for f in (4.0, 8.0))
    assert {k for k in four if four[k] != eight[k]} == {"compression_factor"}
    assert four["encoder"] == setup.compressor.spec.fingerprint
    assert four["store"] == str(index.path)


def test_a_changed_document_replaces_its_spans(setup: Setup, index: MemoryIndex) -> None:
    store = SpanVectorStore(index, setup.compressor)
    run = pipeline(SpanPrecompress(index, setup.compressor), vector_store=store, docstore=SimpleDocumentStore())
    run.run(documents=DOCUMENTS)
    run.run(documents=[DOCUMENTS[0], Document(text="Quite another text.", id_=DOCUMENTS[1].id_), DOCUMENTS[2]])
    texts = {n.ref_doc_id: n.text for n in store.get_nodes()}  # type: ignore[attr-defined]
    assert texts[DOCUMENTS[1].id_] == "Quite another text."
    assert len(index.document_chunks(DOCUMENTS[1].id_)) == 1
    assert len(index.document_chunks(DOCUMENTS[0].id_)) > 1


def test_a_changed_document_behind_another_store_leaves_no_old_span(setup: Setup, index: MemoryIndex) -> None:
    run = pipeline(SpanPrecompress(index, setup.compressor), disable_cache=True)
    run.run(documents=DOCUMENTS)
    run.run(documents=[Document(text="Quite another text.", id_=DOCUMENTS[1].id_)])
    assert [s.chunk.text for s in index.get(index.document_chunks(DOCUMENTS[1].id_))] == ["Quite another text."]


def test_each_text_is_compressed_once(setup: Setup, index: MemoryIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    compressed: list[str] = []
    compress = setup.compressor.compress

    def counting(chunks, **options):  # type: ignore[no-untyped-def]
        compressed.extend(c.text for c in chunks)
        return compress(chunks, **options)

    monkeypatch.setattr(setup.compressor, "compress", counting)
    step = SpanPrecompress(index, setup.compressor)
    step([node("The same.", "a"), node("The same.", "b"), node("Another.", "b", start=9)])
    assert sorted(compressed) == ["Another.", "The same."]
    assert len(index) == 3
    step([node("The same.", "a"), node("New.", "c")])
    assert sorted(compressed) == ["Another.", "New.", "The same."]


def test_another_factor_makes_the_spans_anew(setup: Setup, index: MemoryIndex) -> None:
    text = CORPUS[0].text
    slots = []
    for factor in (4.0, 8.0):
        SpanPrecompress(index, setup.compressor, compression_factor=factor)([node(text, "a")])
        slots.append(index.get(index.document_chunks("a"))[0].span.num_slots)
    assert slots[1] == pytest.approx(slots[0] / 2, abs=1)


def test_nodes_pass_through_as_they_came(setup: Setup, index: MemoryIndex) -> None:
    nodes = [node("Text.", "a", tag="x"), ImageNode(text="", image_url="http://localhost/x.png")]
    before = [n.to_json() for n in nodes]
    assert SpanPrecompress(index, setup.compressor)(nodes) is nodes
    assert [n.to_json() for n in nodes] == before


def test_other_processes_are_refused_with_a_sentence(setup: Setup, index: MemoryIndex) -> None:
    with pytest.raises(InputError, match="Run the pipeline with num_workers=1"):
        pickle.dumps(SpanPrecompress(index, setup.compressor))


def test_nodes_without_embeddings_are_refused_with_a_sentence(setup: Setup, index: MemoryIndex) -> None:
    with pytest.raises(InputError, match="put the embedding model before this step"):
        IngestionPipeline(transformations=[SentenceSplitter(), SpanPrecompress(index, setup.compressor)]).run(
            documents=DOCUMENTS)
