"""Store, compressor, prompt and model: what they keep, and the sentence where something is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
from keyword_retriever import KeywordRetriever
from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.messages import HumanMessage
from langchain_core.prompts import ChatPromptTemplate
from lc_setup import CORPUS, PROMPT, QUESTIONS, Setup

from ctxcomp_rag import InputError, SpanChat
from langchain_ctxcomp import ChatCtxcomp, SpanDocumentCompressor, SpanPrompt, SpanVectorStore


@pytest.fixture
def store(setup: Setup, folder: Path) -> SpanVectorStore:
    return SpanVectorStore.from_texts(
        ["the red boat", "the blue house", "a red house"], DeterministicFakeEmbedding(size=8),
        [{"colour": "red"}, {"colour": "blue", "tags": ["a", "b"]}, {"colour": "red"}], ids=["1", "2", "3"],
        path=folder)


def test_metadata_comes_back_nested_and_filters_limit_what_is_found(store: SpanVectorStore) -> None:
    assert store.get_by_ids(["2"])[0].metadata == {"colour": "blue", "tags": ["a", "b"]}
    found = store.similarity_search("anything", k=9, filter={"colour": "red"})
    assert {d.id for d in found} == {"1", "3"}
    assert {d.id for d in store.as_retriever(search_kwargs={"filter": {"colour": "blue"}}).invoke("x")} == {"2"}


def test_scores_are_cosines_best_first(store: SpanVectorStore) -> None:
    best, score = store.similarity_search_with_score("the blue house", k=3)[0]
    assert (best.id, score) == ("2", pytest.approx(1.0, abs=1e-5))
    relevance = store.similarity_search_with_relevance_scores("the blue house", k=3)
    assert relevance[0][1] == pytest.approx(1.0, abs=1e-5)
    assert all(0 <= r <= 1 for _, r in relevance)


def test_marginal_relevance_prefers_variety(setup: Setup, folder: Path) -> None:
    store = SpanVectorStore.from_texts(["same words", "same words.", "quite another thing"], setup.embeddings,
                                       path=folder)
    near = [d.page_content for d in store.similarity_search("same words", k=2)]
    varied = [d.page_content for d in store.max_marginal_relevance_search("same words", k=2, lambda_mult=0.1)]
    assert set(near) == {"same words", "same words."}
    assert "quite another thing" in varied


def test_an_id_given_again_replaces_its_document_and_its_span(store: SpanVectorStore) -> None:
    store.add_documents([Document("the green boat", id="1")])
    assert store.get_by_ids(["1"])[0].page_content == "the green boat"
    assert len(store.index) == 3
    store.delete(["1", "nobody"])
    assert store.get_by_ids(["1"]) == []


def test_chunks_that_the_core_made_are_documents_by_their_own_id(setup: Setup) -> None:
    (hit,) = setup.store.similarity_search(QUESTIONS[0], k=1)
    assert hit.metadata["document_id"] == CORPUS[0].id
    assert setup.store.get_by_ids([str(hit.id)]) == [hit]


def test_documents_of_any_retriever_get_the_span_of_their_text(setup: Setup) -> None:
    texts = [c.text for c in setup.rag.memory.chunks()]
    retriever = KeywordRetriever(documents=[Document(t, metadata={"n": i}) for i, t in enumerate([*texts, "unknown"])])
    found = retriever.invoke("unknown " + texts[0].split()[0])
    made = SpanDocumentCompressor(setup.chat).compress_documents(found, "")
    assert [d.page_content for d in made] == [d.page_content for d in found]
    assert [d.metadata["n"] for d in made] == [d.metadata["n"] for d in found]
    assert [d.metadata["ctxcomp_ref"] != d.page_content for d in made] == [d.page_content in texts for d in found]


async def test_a_missing_span_is_made_now_where_that_is_asked_for(store: SpanVectorStore) -> None:
    chat = SpanChat(store.compressor.backbone, store.index)  # type: ignore[union-attr]
    given = [Document("the red boat", metadata={"n": 1}), Document("a new text", metadata={"n": 2})]
    now = SpanDocumentCompressor(chat, store=store, on_missing="compress")
    made = await now.acompress_documents(given, "")
    assert [d.metadata["n"] for d in made] == [1, 2]
    assert all("ctxcomp_ref" in d.metadata for d in made)
    with pytest.raises(InputError, match="expected a span for every document, but 1 have none"):
        SpanDocumentCompressor(chat, on_missing="raise").compress_documents([Document("never seen")], "")
    chat.scheduler.close()


def test_what_cannot_be_stored_is_refused_with_the_documents_name(store: SpanVectorStore) -> None:
    with pytest.raises(InputError, match="expected documents with text, but 'e' has none"):
        store.add_documents([Document(" ", id="e")])
    with pytest.raises(InputError, match="metadata of document 'm' cannot be stored as JSON"):
        store.add_documents([Document("x", id="m", metadata={"when": object()})])
    with pytest.raises(InputError, match="expected one id for each of 1 documents, got 2"):
        store.add_documents([Document("x")], ids=["a", "b"])
    with pytest.raises(InputError, match="expected one metadata for each of 1 texts, got 0"):
        store.add_texts(["x"], [])
    with pytest.raises(InputError, match="expected ids to delete, got none"):
        store.delete()


def test_parts_that_do_not_belong_together_are_refused(setup: Setup, store: SpanVectorStore) -> None:
    with pytest.raises(InputError, match=r"was made with the embeddings .* pass the ones it was made with"):
        SpanVectorStore(setup.rag.memory, DeterministicFakeEmbedding(size=8))
    with pytest.raises(InputError, match="opened for reading; pass a compressor"):
        SpanVectorStore(setup.rag.memory, setup.embeddings).add_texts(["x"])
    with pytest.raises(InputError, match="over the same MemoryIndex object"):
        SpanVectorStore(store.index, store.embedding, chat=setup.chat)
    with pytest.raises(InputError, match="over the index of the SpanChat"):
        SpanDocumentCompressor(setup.chat, store=store)
    with pytest.raises(InputError, match="on_missing='compress' needs a store with a compressor"):
        SpanDocumentCompressor(setup.chat, on_missing="compress")
    with pytest.raises(InputError, match="a SpanVectorStore is a folder on disk; pass path="):
        SpanVectorStore.from_texts(["x"], DeterministicFakeEmbedding(size=8))


def test_a_model_needs_either_a_chat_or_an_index(setup: Setup) -> None:
    with pytest.raises(InputError, match=r"either a SpanChat or .* variable CTXCOMP_INDEX"):
        ChatCtxcomp()
    with pytest.raises(InputError, match="either a SpanChat or the folder of an index"):
        ChatCtxcomp(setup.chat, index="kb")


@pytest.mark.parametrize("part", [ChatCtxcomp, SpanDocumentCompressor])
def test_a_folder_in_the_place_of_a_chat_is_answered_with_what_to_type(part: type) -> None:
    with pytest.raises(InputError, match=r"expected a SpanChat, got str 'kb'; open one with SpanChat.open\(folder\)"):
        part("kb")


def test_the_environment_names_an_index_only_where_nothing_else_does(setup: Setup, store: SpanVectorStore,
                                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CTXCOMP_INDEX", str(store.index.path))
    assert ChatCtxcomp(setup.chat).span_chat is setup.chat
    assert ChatCtxcomp(index=str(setup.rag.memory.path)).span_chat.index.path == setup.rag.memory.path
    assert ChatCtxcomp().span_chat.index.path == store.index.path


def test_a_model_named_by_its_index_shares_the_decoder_and_opens_a_closed_one_again(store: SpanVectorStore) -> None:
    path = str(store.index.path)
    first = ChatCtxcomp(index=path, max_tokens=2)
    assert ChatCtxcomp(index=path).span_chat is first.span_chat
    first.span_chat.close()
    assert ChatCtxcomp(index=path, max_tokens=2).invoke("hello").usage_metadata is not None


def test_content_that_the_decoder_cannot_read_is_refused(setup: Setup) -> None:
    with pytest.raises(InputError, match="a block of type 'image_url'"):
        setup.model().invoke([HumanMessage([{"type": "image_url", "image_url": {"url": "x"}}])])
    with pytest.raises(InputError, match="expected a message with text or spans, got none"):
        setup.model().invoke([HumanMessage("")])


def test_a_prompt_says_what_it_expects_in_its_context() -> None:
    with pytest.raises(InputError, match=r"expected a prompt with the variable 'context', got one with \['question'\]"):
        SpanPrompt(ChatPromptTemplate.from_messages([("human", "{question}")]))
    with pytest.raises(InputError, match="expected a list of documents in 'context', got str"):
        SpanPrompt(PROMPT).invoke({"context": "text", "question": "?"})
