"""SpanVectorStore: nodes with their spans are added, found, filtered, replaced, deleted, and still there tomorrow."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from li_setup import EmbeddingCompressor, Setup, node
from llama_index.core import StorageContext
from llama_index.core.schema import ImageNode, NodeRelationship, TextNode
from llama_index.core.vector_stores.types import (
    FilterCondition,
    FilterOperator,
    MetadataFilter,
    MetadataFilters,
    VectorStoreQuery,
    VectorStoreQueryMode,
)

from ctxcomp_rag import InputError, MemoryIndex
from ctxcomp_rag.errors import IncompatibleSpanError
from llama_index_ctxcomp import SpanVectorStore


def ask(axis: int, top_k: int = 2, **more: object) -> VectorStoreQuery:
    return VectorStoreQuery(query_embedding=np.eye(8)[axis].tolist(), similarity_top_k=top_k, **more)  # type: ignore[arg-type]


@pytest.fixture
def filled(empty: SpanVectorStore) -> SpanVectorStore:
    empty.add([node(f"Text number {i}.", f"doc-{i // 2}", id_=f"n{i}", vector=i, year=2000 + i, kind="ab"[i % 2],
                    tags=["x", str(i)]) for i in range(6)])
    return empty


def test_a_node_comes_back_as_it_was_added(empty: SpanVectorStore) -> None:
    one = node("Some text of a node.", "doc", id_="mine", start=7, vector=3, year=1999, tags=["a", "b"])
    one.excluded_llm_metadata_keys = ["year"]
    assert empty.add([one]) == ["mine"]
    result = empty.query(ask(3, 1))
    (back,) = result.nodes or []
    assert isinstance(back, TextNode)
    assert (back.text, back.metadata, back.start_char_idx) == (one.text, one.metadata, 7)
    assert (back.excluded_llm_metadata_keys, back.ref_doc_id) == (["year"], "doc")
    assert result.ids == ["mine"]
    assert result.similarities == pytest.approx([1.0])


def test_the_span_is_committed_with_the_node(filled: SpanVectorStore) -> None:
    assert len(filled.client) == 6
    assert all(s.span.num_slots >= 1 for s in filled.client.get([c.id for c in filled.client.chunks()]))
    assert filled.client.verify().damaged == []


def test_documents_and_nodes_are_deleted(filled: SpanVectorStore) -> None:
    filled.delete("doc-0")
    assert [n.node_id for n in filled.get_nodes()] == ["n2", "n3", "n4", "n5"]
    filled.delete_nodes(["n3", "unknown"])
    filled.delete_nodes(filters=MetadataFilters(filters=[MetadataFilter(key="year", value=2004)]))
    assert [n.node_id for n in filled.get_nodes()] == ["n2", "n5"]
    assert "n3" not in (filled.query(ask(3, 6)).ids or [])
    filled.clear()
    assert filled.get_nodes() == []
    assert filled.query(ask(0)).nodes == []


def test_no_id_comes_to_mean_another_node(filled: SpanVectorStore) -> None:
    filled.delete_nodes(["n1", "n2"])
    filled.add([node("A late text.", "late", id_="n9", vector=1)])
    assert (filled.query(ask(1, 1)).ids, filled.query(ask(5, 1)).ids) == (["n9"], ["n5"])
    assert filled.get_nodes(["n1"]) == []
    assert {n.node_id: n.text for n in filled.get_nodes(["n9", "n5"])} == {"n9": "A late text.", "n5": "Text number 5."}


def test_adding_again_replaces(filled: SpanVectorStore) -> None:
    filled.add([node("Text number 0.", "doc-0", id_="n0", vector=0, year=1)])
    filled.add([node("Another text for node 1.", "doc-0", id_="n1", vector=1)])
    assert len(filled.client) == 6
    assert filled.get_nodes(["n0"])[0].metadata == {"year": 1}
    assert [n.text for n in filled.get_nodes(["n1"])] == ["Another text for node 1."]  # type: ignore[attr-defined]
    version = filled.client.version
    filled.add([node("Text number 0.", "doc-0", id_="n0", vector=0, year=1)])
    assert filled.client.version == version


@pytest.mark.parametrize(("filters", "expected"), [
    ([MetadataFilter(key="kind", value="a")], {"n0", "n2", "n4"}),
    ([MetadataFilter(key="year", value=2003, operator=FilterOperator.GTE)], {"n3", "n4", "n5"}),
    ([MetadataFilter(key="kind", value="a"), MetadataFilter(key="year", value=2000, operator=FilterOperator.NE)],
     {"n2", "n4"}),
    ([MetadataFilter(key="tags", value="4", operator=FilterOperator.CONTAINS)], {"n4"}),
    ([MetadataFilter(key="doc_id", value="doc-1")], {"n2", "n3"}),
    ([MetadataFilter(key="year", value=[2001, 2005], operator=FilterOperator.IN)], {"n1", "n5"}),
    ([MetadataFilters(filters=[MetadataFilter(key="year", value=2000), MetadataFilter(key="year", value=2001)],
                      condition=FilterCondition.OR), MetadataFilter(key="kind", value="b")], {"n1"}),
    ([MetadataFilter(key="kind", value="c")], set()),
])
def test_filters_are_applied_before_the_best_are_chosen(filled: SpanVectorStore, filters: list[MetadataFilter],
                                                        expected: set[str]) -> None:
    found = filled.query(ask(0, 6, filters=MetadataFilters(filters=filters)))  # type: ignore[arg-type]
    assert set(found.ids or []) == expected
    assert {n.node_id for n in filled.get_nodes(filters=MetadataFilters(filters=filters))} == expected  # type: ignore[arg-type]


def test_a_rare_match_far_from_the_question_is_found(filled: SpanVectorStore) -> None:
    rare = MetadataFilters(filters=[MetadataFilter(key="year", value=2005)])
    assert filled.query(ask(0, 1, filters=rare)).ids == ["n5"]
    assert filled.query(ask(0, 1, doc_ids=["doc-2"])).ids in (["n4"], ["n5"])
    assert set(filled.query(ask(0, 5, node_ids=["n2", "n5"])).ids or []) == {"n2", "n5"}


def test_what_was_stored_is_opened_again(filled: SpanVectorStore, setup: Setup, tmp_path: Path) -> None:
    StorageContext.from_defaults(vector_store=filled).persist(persist_dir=str(tmp_path / "storage"))
    filled.client.close()
    again = SpanVectorStore.from_persist_dir(str(tmp_path / "storage"), compressor=setup.compressor)
    assert again.query(ask(2, 1)).ids == ["n2"]
    again.add([node("One more.", "new", id_="n7", vector=7)])
    assert len(again.client) == 7
    with pytest.raises(InputError, match=r"expected the note that SpanVectorStore.persist writes .* MemoryIndex.open"):
        SpanVectorStore.from_persist_path(str(tmp_path / "nothing.json"))


def test_a_published_index_is_noted_by_its_uri(filled: SpanVectorStore, tmp_path: Path) -> None:
    filled.client.location = "s3://bucket/kb"  # as MemoryIndex.open("s3://bucket/kb") has it
    filled.persist(str(tmp_path / "store.json"))
    assert json.loads((tmp_path / "store.json").read_text()) == {"ctxcomp_index": "s3://bucket/kb"}


async def test_asynchronous_methods_do_the_same(empty: SpanVectorStore) -> None:
    await empty.async_add([node("First.", "a", id_="1", vector=0), node("Second.", "b", id_="2", vector=1)])
    assert (await empty.aquery(ask(1, 1))).ids == ["2"]
    assert [n.node_id for n in await empty.aget_nodes(["2", "1"])] == ["2", "1"]
    await empty.adelete("a")
    await empty.adelete_nodes(["2"])
    assert await empty.aget_nodes() == []
    await empty.aclear()


def test_an_index_that_the_core_made_is_a_store(setup: Setup) -> None:
    (one,) = setup.store.get_nodes([next(iter(setup.rag.memory.chunks())).id])
    assert one.relationships[NodeRelationship.SOURCE]
    assert set(one.metadata) == {"kind"}


@pytest.mark.parametrize(("what", "message"), [
    (TextNode(text="no vector"), "has none; put the embedding model before this step"),
    (ImageNode(text="", embedding=[1.0] * 8), "has none; leave it out, or keep it in another vector store"),
    (TextNode(text="short", embedding=[1.0] * 3), r"expected vectors of shape \(n, 8\)"),
])
def test_nodes_that_cannot_be_stored_are_named(empty: SpanVectorStore, what: TextNode, message: str) -> None:
    with pytest.raises(InputError, match=message):
        empty.add([what])


def test_misuse_is_answered_with_a_sentence(filled: SpanVectorStore, setup: Setup) -> None:
    with pytest.raises(InputError, match="pass a compressor to add nodes"):
        SpanVectorStore(filled.client).add([node("x")])
    with pytest.raises(InputError, match="it has no mode 'mmr'"):
        filled.query(ask(0, mode=VectorStoreQueryMode.MMR))
    with pytest.raises(InputError, match="expected a query with an embedding"):
        filled.query(VectorStoreQuery())
    with pytest.raises(InputError, match="expected node_ids or filters to delete"):
        filled.delete_nodes()
    with pytest.raises(InputError, match=r"the filter 'kind' > 3 cannot be applied to the value 'a'"):
        filled.query(ask(0, filters=MetadataFilters(
            filters=[MetadataFilter(key="kind", value=3, operator=FilterOperator.GT)])))
    with pytest.raises(IncompatibleSpanError, match="made by the compressor"):
        SpanVectorStore(filled.client, EmbeddingCompressor(setup.compressor))
    assert isinstance(filled.client, MemoryIndex)
