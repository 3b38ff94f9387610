"""When something fails, documents stay: as many, in their order, with their metadata, as text or with a sentence."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from langchain_classic.chains.combine_documents import create_stuff_documents_chain
from langchain_core.documents import Document
from langchain_core.prompts import ChatPromptTemplate
from lc_setup import CORPUS, PROMPT, Setup, about

from ctxcomp_rag import CompressedRAG, InputError, MemoryIndex, SoftSpan, SpanChat
from ctxcomp_rag import Document as CoreDocument
from ctxcomp_rag.errors import IndexDamagedError, IndexFolderError
from langchain_ctxcomp import (
    SPAN_DOCUMENT_PROMPT,
    ChatCtxcomp,
    EncoderEmbeddings,
    SpanDocumentCompressor,
    SpanPrompt,
    SpanVectorStore,
)

TEXTS = [d.text for d in CORPUS[:3]]


def given() -> list[Document]:
    return [Document(text, id=str(i), metadata={"n": i}) for i, text in enumerate(TEXTS)]


@pytest.fixture
def own(setup: Setup, folder: Path) -> Iterator[CompressedRAG]:
    """An index of this test alone."""
    index = MemoryIndex.create(folder, setup.compressor.spec, vector_size=384,
                               retrieval_encoder=setup.rag.memory.retrieval_encoder, codec="exact")
    with CompressedRAG(setup.rag.backbone, index, setup.rag.encoder, setup.compressor) as rag:
        rag.index([CoreDocument(str(i), text) for i, text in enumerate(TEXTS)])
        yield rag


@pytest.fixture
def damaged(own: CompressedRAG) -> Iterator[SpanChat]:
    """Over an index whose second span has lost a bit on the disk."""
    (name,) = own.memory.document_chunks("1")
    span = own.memory.get([name])[0].span
    assert isinstance(span, SoftSpan)
    lost = span.embeds.numpy().tobytes()[:64]
    (file,) = [f for f in (own.memory.path / "spans.lance" / "data").rglob("*.lance") if lost in f.read_bytes()]
    content = bytearray(file.read_bytes())
    content[content.index(lost) + 5] ^= 1
    file.write_bytes(bytes(content))
    with SpanChat(own.backbone, MemoryIndex.open(own.memory.path, read_only=True)) as chat:
        yield chat


def test_a_damaged_span_is_read_as_its_text_and_takes_no_other_with_it(
        damaged: SpanChat, caplog: pytest.LogCaptureFixture) -> None:
    marked = SpanDocumentCompressor(damaged).compress_documents(given(), "")
    message = SpanPrompt(PROMPT).invoke({"context": marked, "question": "why?"})
    with caplog.at_level(logging.WARNING, "ctxcomp_rag"):
        said = ChatCtxcomp(damaged, max_tokens=2).invoke(message)
    assert (about(said)["spans"], about(said)["rejected"]) == (2, {"damaged": 1})
    assert about(said)["text_tokens"] > len(damaged.backbone.tokenizer.encode(TEXTS[1]))
    assert "a span stays text: chunk" in caplog.text
    with pytest.raises(IndexDamagedError, match="is damaged: the stored bytes do not match their checksum"):
        ChatCtxcomp(damaged, max_tokens=2, on_error="raise").invoke(message)


async def test_a_damaged_span_raises_on_every_path_where_that_is_wanted(damaged: SpanChat) -> None:
    marked = SpanDocumentCompressor(damaged).compress_documents(given(), "")
    message = SpanPrompt(PROMPT).invoke({"context": marked, "question": "why?"})
    strict = ChatCtxcomp(damaged, max_tokens=2, on_error="raise")
    with pytest.raises(IndexDamagedError, match="is damaged"):
        await strict.ainvoke(message)
    with pytest.raises(IndexDamagedError, match="is damaged"):
        list(strict.stream(message))
    with pytest.raises(IndexDamagedError, match="is damaged"):
        [chunk async for chunk in strict.astream(message)]
    (failure,) = strict.batch([message], return_exceptions=True)
    assert isinstance(failure, IndexDamagedError)


def lose(index: MemoryIndex) -> None:
    """The data files are gone, as on a disk that was taken away."""
    for file in (index.path / "spans.lance").rglob("*.lance"):
        file.unlink()


def test_an_index_that_cannot_be_looked_up_leaves_all_documents_as_text(own: CompressedRAG) -> None:
    chat = SpanChat(own.backbone, MemoryIndex.open(own.memory.path, read_only=True))
    lose(own.memory)
    out = SpanDocumentCompressor(chat).compress_documents(given(), "")
    assert [(d.page_content, d.id, d.metadata["n"]) for d in out] == [(d.page_content, d.id, d.metadata["n"])
                                                                      for d in given()]
    assert [d.metadata["ctxcomp_ref"] for d in out] == TEXTS
    with pytest.raises(IndexDamagedError, match=r"expected readable data files .* Run verify\(\)"):
        SpanDocumentCompressor(chat, on_error="raise").compress_documents(given(), "")
    with pytest.raises(IndexDamagedError, match=r"expected readable data files"):
        SpanDocumentCompressor(chat, on_missing="raise").compress_documents(given(), "")


def test_an_index_that_was_moved_away_is_text_or_raised_by_the_model(own: CompressedRAG, tmp_path: Path) -> None:
    chat = SpanChat(own.backbone, MemoryIndex.open(own.memory.path, read_only=True))
    marked = SpanDocumentCompressor(chat).compress_documents(given(), "")
    message = SpanPrompt(PROMPT).invoke({"context": marked, "question": "why?"})
    own.memory.path.rename(tmp_path / "elsewhere")
    try:
        said = ChatCtxcomp(chat, max_tokens=2).invoke(message)
        assert about(said)["rejected"] == {"damaged": 3}
        with pytest.raises(IndexFolderError, match="Was it moved or deleted"):
            ChatCtxcomp(chat, max_tokens=2, on_error="raise").invoke(message)
    finally:
        (tmp_path / "elsewhere").rename(own.memory.path)
    chat.close()


class Unreachable(EncoderEmbeddings):
    """Embeddings of a service that does not answer when asked to embed a certain text."""

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        if any("unlucky" in text for text in texts):
            raise ConnectionError("the embedding service does not answer")
        return super().embed_documents(texts)


def test_what_cannot_be_compressed_now_stays_text_and_takes_no_other_with_it(setup: Setup, own: CompressedRAG,
                                                                             caplog: pytest.LogCaptureFixture) -> None:
    chat = SpanChat(own.backbone, own.memory)
    store = SpanVectorStore(own.memory, Unreachable(own.encoder), own.compressor)
    documents = [Document("An unlucky text.", metadata={"n": 0}), *given(),
                 Document("A lucky text.", metadata={"n": 4}),
                 Document("A text with an object.", metadata={"n": object()}), Document("  ")]
    now = SpanDocumentCompressor(chat, store=store, on_missing="compress")
    out = now.compress_documents(documents, "")
    assert [d.page_content for d in out] == [d.page_content for d in documents]
    assert [d.metadata.get("n") for d in out] == [d.metadata.get("n") for d in documents]
    assert [d.metadata["ctxcomp_ref"].startswith("[[span:") for d in out] == [False, True, True, True, True, False,
                                                                              False]
    assert "the embedding service does not answer" in caplog.text
    with pytest.raises(ConnectionError, match="does not answer"):
        SpanDocumentCompressor(chat, store=store, on_missing="compress", on_error="raise").compress_documents(
            documents[:1], "")
    chat.scheduler.close()


def test_a_document_without_a_span_is_dropped_by_no_part(setup: Setup) -> None:
    known = next(iter(setup.rag.memory.chunks())).text
    documents = [Document("Unknown to the index.", metadata={"n": 0}), Document(known, metadata={"n": 1}),
                 Document("Unknown as well.", metadata={"n": 2})]
    marked = SpanDocumentCompressor(setup.chat).compress_documents(documents, "")
    assert [d.metadata["n"] for d in marked] == [0, 1, 2]
    (message,) = SpanPrompt(PROMPT).invoke({"context": marked, "question": "who?"}).to_messages()
    assert [(b["type"], b["text"]) for b in message.content][:5:2] == [  # type: ignore[index]
        ("text", "Unknown to the index."), ("span", known), ("text", "Unknown as well.")]
    stuffed = create_stuff_documents_chain(
        setup.model(allow_text_references=True), ChatPromptTemplate.from_messages([("human", "{context}\n\n{input}")]),
        document_prompt=SPAN_DOCUMENT_PROMPT)
    assert isinstance(stuffed.invoke({"context": marked, "input": "who?"}), str)


def test_a_retriever_whose_spans_cannot_be_looked_up_returns_text_or_raises(
        setup: Setup, own: CompressedRAG, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = SpanChat(own.backbone, own.memory)
    store = SpanVectorStore(own.memory, setup.embeddings, chat=chat)
    usual = own.memory.chunks_of_texts

    def fails(texts: list[str]) -> list[str | None]:
        usual(texts)
        raise IndexDamagedError("a data file cannot be read")

    monkeypatch.setattr(own.memory, "chunks_of_texts", fails)
    found = store.as_retriever(search_kwargs={"k": 3}).invoke("who?")
    assert [d.metadata["ctxcomp_ref"] for d in found] == [d.page_content for d in found]
    assert len(found) == 3
    with pytest.raises(IndexDamagedError, match="cannot be read"):
        store.as_retriever(on_error="raise").invoke("who?")
    chat.scheduler.close()


@pytest.mark.parametrize("part", [SpanDocumentCompressor, ChatCtxcomp])
def test_what_to_do_on_an_error_is_one_of_two(setup: Setup, part: type) -> None:
    with pytest.raises(ValueError, match="Input should be 'text' or 'raise'"):
        part(setup.chat, on_error="ignore")
    with pytest.raises(InputError, match="expected on_error='text' or 'raise', got 'ignore'"):
        setup.chat.prompt([], "scope", on_error="ignore")  # type: ignore[arg-type]
