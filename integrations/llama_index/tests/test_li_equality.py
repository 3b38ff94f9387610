"""The framework's answer is the core's own answer, token for token, on every path."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from li_setup import CORPUS, QUESTIONS, SHORT, TOKENS, EmbeddingCompressor, Setup
from llama_index.core import VectorStoreIndex
from llama_index.core.base.response.schema import AsyncStreamingResponse, StreamingResponse
from llama_index.core.llms import ChatMessage
from llama_index.core.query_engine import RetrieverQueryEngine, RouterQueryEngine
from llama_index.core.schema import MetadataMode, TextNode
from llama_index.core.selectors import EmbeddingSingleSelector
from llama_index.core.tools import QueryEngineTool

from ctxcomp_rag import MemoryIndex, SpanChat
from llama_index_ctxcomp import CtxcompLLM, PlainBlock, SpanPostprocessor, SpanSynthesizer, SpanVectorStore


@pytest.mark.parametrize("question", QUESTIONS[:4])
def test_a_query_engine_answers_like_the_core(setup: Setup, question: str) -> None:
    engine = setup.store_index().as_query_engine(
        llm=setup.llm(), similarity_top_k=3, node_postprocessors=[setup.postprocessor()],
        response_synthesizer=setup.synthesizer())
    response = engine.query(question)
    expected = setup.rag.answer(question, settings=SHORT)
    assert response.response == expected.text
    assert [n.node.ref_doc_id for n in response.source_nodes] == [s.chunk.document_id for s in expected.sources]
    assert [n.score for n in response.source_nodes] == pytest.approx([s.score for s in expected.sources])
    assert [n.node.text for n in response.source_nodes] == [s.chunk.text for s in expected.sources]
    assert [n.node.metadata for n in response.source_nodes] == [dict(s.chunk.metadata) for s in expected.sources]


@pytest.mark.parametrize("question", QUESTIONS[:3])
def test_an_answer_that_quotes_is_the_cores_and_words_of_what_was_retrieved(setup: Setup, question: str) -> None:
    llm = CtxcompLLM(setup.chat, max_tokens=TOKENS, quote=True)
    engine = setup.store_index().as_query_engine(
        llm=llm, similarity_top_k=3, node_postprocessors=[setup.postprocessor()],
        response_synthesizer=SpanSynthesizer(llm))
    expected = setup.rag.answer(question, settings=SHORT, quote=True)
    assert engine.query(question).response == expected.text
    assert expected.text == "not stated" or any(expected.text in s.chunk.text for s in expected.sources)
    assert llm.complete("Hello.").text == setup.llm().complete("Hello.").text  # nothing to quote from


async def test_asynchronous_and_streamed_answers_are_the_same(setup: Setup) -> None:
    question = QUESTIONS[1]
    expected = setup.answer(question)
    retriever = setup.store_index().as_retriever(similarity_top_k=3)

    def engine(streaming: bool) -> RetrieverQueryEngine:
        return RetrieverQueryEngine.from_args(retriever, llm=setup.llm(), node_postprocessors=[setup.postprocessor()],
                                              response_synthesizer=setup.synthesizer(streaming))

    streamed = engine(True).query(question)
    assert isinstance(streamed, StreamingResponse)
    assert "".join(streamed.response_gen) == expected
    assert (await engine(False).aquery(question)).response == expected  # type: ignore[union-attr]
    later = await engine(True).aquery(question)
    assert isinstance(later, AsyncStreamingResponse)
    assert "".join([piece async for piece in later.async_response_gen()]) == expected


def test_a_router_passes_the_question_to_an_engine_over_spans(setup: Setup) -> None:
    engine = RetrieverQueryEngine(setup.store_index().as_retriever(similarity_top_k=3), setup.synthesizer(),
                                  [setup.postprocessor()])
    router = RouterQueryEngine(
        selector=EmbeddingSingleSelector.from_defaults(embed_model=setup.embedding), llm=setup.llm(),
        summarizer=setup.synthesizer(),
        query_engine_tools=[QueryEngineTool.from_defaults(engine, description="facts about lighthouses and novels")])
    assert router.query(QUESTIONS[2]).response == setup.answer(QUESTIONS[2])


def test_nodes_without_spans_are_read_as_the_cores_plain_text(setup: Setup) -> None:
    question = QUESTIONS[0]
    response = setup.synthesizer().synthesize(question, setup.retrieved(question))
    assert response.response == setup.rag.answer(question, mode="text", settings=SHORT).text


def test_usage_counts_slots_as_positions(setup: Setup) -> None:
    question = QUESTIONS[0]
    expected = setup.rag.answer(question, settings=SHORT)
    nodes = setup.postprocessor().postprocess_nodes(setup.retrieved(question))
    blocks = [b for n in nodes for b in (*n.node.get_content_blocks(MetadataMode.LLM), PlainBlock(text="\n\n"))]
    blocks = [*blocks[:-1], PlainBlock(text=f"\n\nQuestion: {question}")]
    response = setup.llm().chat([ChatMessage(role="user", blocks=blocks)])
    assert response.additional_kwargs["prompt_tokens"] == expected.usage.positions
    assert response.raw["usage"]["completion_tokens"] == expected.completion_tokens
    assert response.raw["ctxcomp"]["slots"] == expected.usage.slots
    assert response.raw["ctxcomp"]["spans"] == len(expected.sources)
    assert response.raw["ctxcomp"]["rejected"] == {}


@pytest.fixture
def plain(setup: Setup, tmp_path: Path) -> Iterator[tuple[SpanChat, SpanVectorStore]]:
    """An index whose spans are the embeddings of the texts themselves."""
    compressor = EmbeddingCompressor(setup.compressor)
    with MemoryIndex.create(tmp_path / "kb", compressor.spec, vector_size=384, codec="exact",
                            retrieval_encoder=setup.embedding.model_name) as index:
        store = SpanVectorStore(index, compressor)
        nodes = [TextNode(text=d.text, id_=d.id) for d in CORPUS]
        for node in nodes:
            node.embedding = setup.embedding.get_text_embedding(node.text)
        store.add(nodes)
        with SpanChat(setup.rag.backbone, index) as chat:
            yield chat, store


async def test_spans_of_the_texts_own_embeddings_give_the_plain_text_answer(
        setup: Setup, plain: tuple[SpanChat, SpanVectorStore]) -> None:
    chat, store = plain
    llm = CtxcompLLM(chat, max_tokens=TOKENS)
    index = VectorStoreIndex.from_vector_store(store, embed_model=setup.embedding)

    def engine(spans: bool, streaming: bool = False):  # type: ignore[no-untyped-def]
        return index.as_query_engine(llm=llm, similarity_top_k=2, response_synthesizer=SpanSynthesizer(
            llm, streaming=streaming), node_postprocessors=[SpanPostprocessor(chat)] if spans else [])

    for question in QUESTIONS[:3]:
        expected = engine(spans=False).query(question).response
        assert engine(spans=True).query(question).response == expected
        assert "".join(engine(spans=True, streaming=True).query(question).response_gen) == expected
        assert (await engine(spans=True).aquery(question)).response == expected
