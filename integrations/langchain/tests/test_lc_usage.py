"""Usage: what the decoder read, and how much of it cost nothing because it came as stored keys and values."""

from __future__ import annotations

from pathlib import Path

from langchain_core.messages import AIMessage, AIMessageChunk
from lc_setup import CORPUS, PROMPT, QUESTIONS, Setup, about

from ctxcomp_rag import CompressedRAG, Document, SpanChat
from langchain_ctxcomp import ChatCtxcomp, EncoderEmbeddings, SpanPrompt, SpanVectorStore


def ask(chat: SpanChat, setup: Setup, question: str = QUESTIONS[0]) -> AIMessage:
    store = SpanVectorStore(chat.index, EncoderEmbeddings(setup.rag.encoder), chat=chat)
    found = store.as_retriever(search_kwargs={"k": 2}).invoke(question)
    return ChatCtxcomp(chat, max_tokens=4).invoke(SpanPrompt(PROMPT).invoke({"context": found, "question": question}))


def details(message: AIMessage) -> tuple[int, int]:
    assert message.usage_metadata is not None
    found = message.usage_metadata["input_token_details"]
    return found["cache_read"], found["cache_creation"]


def test_slots_that_go_through_the_layers_are_not_read_from_a_cache(setup: Setup) -> None:
    said = ask(setup.chat, setup)
    assert about(said)["slots"] > 0
    assert details(said) == (0, 0)


def test_prerolled_spans_are_created_by_the_first_call_and_read_by_the_next(setup: Setup) -> None:
    chat = SpanChat(setup.rag.backbone, setup.rag.memory, prerolled_bytes=2**24)
    first, second, other = (ask(chat, setup, q) for q in (QUESTIONS[0], QUESTIONS[0], QUESTIONS[1]))
    chat.scheduler.close()
    rolled = about(first)["slots"]
    assert details(first) == (0, rolled)
    assert details(second) == (rolled, 0)
    assert sum(details(other)) == about(other)["slots"]
    assert second.content == first.content
    assert second.usage_metadata["input_tokens"] == ask(setup.chat, setup).usage_metadata["input_tokens"]  # type: ignore[index]


def test_stored_keys_and_values_are_read_from_the_cache_waited_for_and_streamed(setup: Setup, folder: Path) -> None:
    with CompressedRAG.create(folder, compressor="infinipot", budget="16slots", encoder=setup.rag.encoder) as rag:
        rag.index([Document(d.id, d.text) for d in CORPUS[:2]])
        with SpanChat(rag.backbone, rag.memory) as chat:
            said = ask(chat, setup)
            assert details(said) == (about(said)["slots"], 0)
            assert said.usage_metadata["input_tokens"] == about(said)["slots"] + about(said)["text_tokens"]  # type: ignore[index]
            store = SpanVectorStore(rag.memory, setup.embeddings, chat=chat)
            found = store.as_retriever(search_kwargs={"k": 2}).invoke(QUESTIONS[0])
            chunks = list(ChatCtxcomp(chat, max_tokens=4).stream(
                SpanPrompt(PROMPT).invoke({"context": found, "question": QUESTIONS[0]})))
            whole = chunks[0]
            for chunk in chunks[1:]:
                whole += chunk
            assert isinstance(whole, AIMessageChunk)
            assert whole.usage_metadata == said.usage_metadata


def test_a_span_that_becomes_text_is_not_counted_as_read_from_a_cache(setup: Setup, folder: Path) -> None:
    with CompressedRAG.create(folder, compressor="infinipot", budget="16slots", encoder=setup.rag.encoder) as rag:
        rag.index([Document(d.id, d.text) for d in CORPUS[:2]])
        with SpanChat(rag.backbone, rag.memory) as chat:
            store = SpanVectorStore(rag.memory, setup.embeddings, chat=chat)
            found = store.as_retriever(search_kwargs={"k": 2}).invoke(QUESTIONS[0])
            message = SpanPrompt(PROMPT).invoke({"context": found, "question": QUESTIONS[0]})
            chat.references.revoke(chunk_id=rag.memory.chunks_of_texts([found[0].page_content])[0])
            said = ChatCtxcomp(chat, max_tokens=4).invoke(message)
            assert about(said)["rejected"] == {"unknown": 1}
            assert details(said) == (16, 0)
