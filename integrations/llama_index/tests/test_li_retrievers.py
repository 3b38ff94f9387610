"""Behind retrievers that are not ours: spans where the text has one, text where it has none, nothing lost."""

from __future__ import annotations

import pytest
from li_keyword_retriever import KeywordRetriever
from li_setup import QUESTIONS, SHORT, RecordingLLM, Setup, node
from llama_index.core.query_engine import RetrieverQueryEngine, RouterQueryEngine
from llama_index.core.response_synthesizers import get_response_synthesizer
from llama_index.core.schema import NodeRelationship, RelatedNodeInfo, TextNode
from llama_index.core.selectors import EmbeddingSingleSelector
from llama_index.core.tools import QueryEngineTool

from llama_index_ctxcomp import SpanSynthesizer, span_prompt_helper


@pytest.fixture
def retriever(setup: Setup) -> KeywordRetriever:
    """Over nodes of another store: the same texts of the same documents, other ids, and one text without a span."""
    source = NodeRelationship.SOURCE
    nodes = [TextNode(text=c.text, id_=f"other-{i}", start_char_idx=c.start, metadata={"n": i},
                      relationships={source: RelatedNodeInfo(node_id=c.document_id)})
             for i, c in enumerate(setup.rag.memory.chunks())]
    return KeywordRetriever([node("What is the the the of? Nobody knows.", "elsewhere"), *nodes])


def test_a_query_engine_behind_a_keyword_retriever(setup: Setup, retriever: KeywordRetriever) -> None:
    llm = RecordingLLM(setup.chat, max_tokens=2)
    engine = RetrieverQueryEngine(retriever, SpanSynthesizer(llm), [setup.postprocessor()])
    found = retriever.retrieve(QUESTIONS[0])
    response = engine.query(QUESTIONS[0])
    assert [(n.node.node_id, n.score, n.node.metadata, n.node.text) for n in response.source_nodes] == [
        (n.node.node_id, n.score, n.node.metadata, n.node.text) for n in found]
    assert len(llm.spliced) == sum(n.node.ref_doc_id != "elsewhere" for n in found) >= 2
    assert llm.rejected == {}


def test_the_same_documents_in_the_same_order_give_the_cores_answer(setup: Setup, retriever: KeywordRetriever) -> None:
    question = QUESTIONS[0]
    sources = setup.rag.retrieve(question)
    place = {c.text: i for i, c in enumerate(setup.rag.memory.chunks())}
    found = [n for s in sources for n in retriever._nodes if n.node_id == f"other-{place[s.chunk.text]}"]
    engine = RetrieverQueryEngine(_Fixed(found), setup.synthesizer(), [setup.postprocessor()])
    assert engine.query(question).response == setup.rag.answer(question, settings=SHORT).text


class _Fixed(KeywordRetriever):
    """All its nodes, whatever is asked."""

    def _retrieve(self, query_bundle):  # type: ignore[no-untyped-def]
        from llama_index.core.schema import NodeWithScore

        return [NodeWithScore(node=n, score=1.0) for n in self._nodes]


@pytest.mark.parametrize("mode", ["compact", "refine", "tree_summarize", "accumulate", "compact_accumulate"])
def test_the_frameworks_synthesizers_behind_a_keyword_retriever(setup: Setup, retriever: KeywordRetriever,
                                                                mode: str) -> None:
    llm = RecordingLLM(setup.chat, scope="tenant", max_tokens=2)
    engine = RetrieverQueryEngine(
        retriever, get_response_synthesizer(llm=llm, response_mode=mode,  # type: ignore[arg-type]
                                            prompt_helper=span_prompt_helper(llm)), [setup.postprocessor("tenant")])
    response = engine.query(QUESTIONS[0])
    with_span = [n for n in response.source_nodes if n.node.ref_doc_id != "elsewhere"]
    assert len(llm.spliced) == len(with_span)
    assert llm.rejected == {}
    assert [n.node.node_id for n in response.source_nodes] == [
        n.node.node_id for n in retriever.retrieve(QUESTIONS[0])]


async def test_a_router_over_two_engines_streams_and_awaits(setup: Setup, retriever: KeywordRetriever) -> None:
    by_vector = RetrieverQueryEngine(setup.store_index().as_retriever(similarity_top_k=3),
                                     setup.synthesizer(streaming=True), [setup.postprocessor()])
    by_word = RetrieverQueryEngine(retriever, setup.synthesizer(streaming=True), [setup.postprocessor()])
    router = RouterQueryEngine(
        selector=EmbeddingSingleSelector.from_defaults(embed_model=setup.embedding), llm=setup.llm(),
        summarizer=setup.synthesizer(),
        query_engine_tools=[QueryEngineTool.from_defaults(by_vector, description=QUESTIONS[1]),
                            QueryEngineTool.from_defaults(by_word, description="keywords of recipes and gardening")])
    response = await router.aquery(QUESTIONS[1])
    assert "".join([piece async for piece in response.async_response_gen()]) == setup.answer(QUESTIONS[1])  # type: ignore[union-attr]
    assert "".join(router.query(QUESTIONS[1]).response_gen) == setup.answer(QUESTIONS[1])  # type: ignore[union-attr]
