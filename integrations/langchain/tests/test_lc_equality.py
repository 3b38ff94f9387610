"""The framework's answer is the core's answer, token for token, on every path."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from langchain_core.documents import Document
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from lc_setup import CORPUS, PROMPT, QUESTIONS, Setup

from ctxcomp_rag import Document as CoreDocument
from ctxcomp_rag import GenerationSettings, MemoryIndex, SoftSpan, SpanChat, SpanSpec, split_document
from langchain_ctxcomp import ChatCtxcomp, SpanDocumentCompressor, SpanPrompt

SETTINGS = GenerationSettings(max_new_tokens=16)


@pytest.fixture(scope="module")
def expected(setup: Setup) -> list[str]:
    return [setup.rag.answer(q, settings=SETTINGS).text for q in QUESTIONS]


def test_invoke_and_batch_answer_as_the_core_does(setup: Setup, expected: list[str]) -> None:
    chain = setup.chain()
    assert chain.invoke(QUESTIONS[0]) == expected[0]
    assert chain.batch(QUESTIONS) == expected


def test_streamed_pieces_joined_are_the_answer(setup: Setup, expected: list[str]) -> None:
    assert "".join(setup.chain().stream(QUESTIONS[1])) == expected[1]


async def test_async_paths_answer_as_the_core_does(setup: Setup, expected: list[str]) -> None:
    chain = setup.chain()
    assert await chain.ainvoke(QUESTIONS[0]) == expected[0]
    assert await chain.abatch(QUESTIONS) == expected
    assert "".join([piece async for piece in chain.astream(QUESTIONS[2])]) == expected[2]


async def test_answers_that_quote_are_the_cores_and_words_of_what_was_retrieved(setup: Setup) -> None:
    chain = setup.chain(quote=True)
    answers = [setup.rag.answer(q, settings=SETTINGS, quote=True) for q in QUESTIONS]
    for answer in answers:
        assert answer.text == "not stated" or any(answer.text in s.chunk.text for s in answer.sources)
    expected = [answer.text for answer in answers]
    assert chain.batch(QUESTIONS) == expected
    assert await chain.ainvoke(QUESTIONS[0]) == expected[0]
    assert "".join(chain.stream(QUESTIONS[1])) == expected[1]
    model = ChatCtxcomp(setup.chat, max_tokens=8, quote=True)
    free = ChatCtxcomp(setup.chat, max_tokens=8)
    assert model.invoke("Hello.").content == free.invoke("Hello.").content  # nothing to quote from
    assert model._get_llm_string() != free._get_llm_string()


def test_thirty_two_threads_each_get_their_own_answer(setup: Setup, expected: list[str]) -> None:
    chain = setup.chain()
    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(chain.invoke, QUESTIONS * 4))
    assert answers == expected * 4


async def test_a_cancelled_task_leaves_the_others_alone(setup: Setup, expected: list[str]) -> None:
    chain = setup.chain()
    long = asyncio.create_task(setup.chain(max_tokens=400).ainvoke(QUESTIONS[3]))
    await asyncio.sleep(0.05)
    long.cancel()
    assert await chain.ainvoke(QUESTIONS[0]) == expected[0]
    with pytest.raises(asyncio.CancelledError):
        await long


def test_usage_counts_positions_slots_included(setup: Setup) -> None:
    core = setup.rag.answer(QUESTIONS[0], settings=SETTINGS)
    documents = setup.store.as_retriever(search_kwargs={"k": 3}).invoke(QUESTIONS[0])
    messages = SpanPrompt(PROMPT).invoke({"context": documents, "question": QUESTIONS[0]}).to_messages()
    answer = setup.model().invoke(messages)
    assert isinstance(answer, AIMessage)
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["input_tokens"] == core.usage.positions
    assert answer.usage_metadata["output_tokens"] == core.completion_tokens
    about = answer.response_metadata["ctxcomp"]
    assert (about["spans"], about["slots"], about["rejected"]) == (3, core.usage.slots, {})
    assert setup.model().get_num_tokens_from_messages(messages) == core.usage.positions


def test_without_spans_the_same_prompt_is_the_plain_text_answer(setup: Setup) -> None:
    plain = [Document(c.chunk.text) for c in setup.rag.retrieve(QUESTIONS[0])]
    messages = SpanPrompt(PROMPT).invoke({"context": plain, "question": QUESTIONS[0]}).to_messages()
    assert setup.model().invoke(messages).content == setup.rag.answer(QUESTIONS[0], mode="text", settings=SETTINGS).text


def test_spans_of_the_texts_own_embeddings_give_the_plain_text_answer(setup: Setup, folder: object) -> None:
    backbone = setup.rag.backbone
    spec = SpanSpec("soft", backbone.fingerprint, "own-embeddings")
    chunks = [split_document(CoreDocument(d.id, d.text), backbone.tokenizer, max_tokens=144)[0] for d in CORPUS[:3]]
    spans = []
    for chunk in chunks:
        ids = backbone.tokenizer.encode(chunk.text)
        spans.append(SoftSpan(chunk.id, len(ids), torch.arange(len(ids)), len(ids), backbone.embed(torch.tensor(ids))))
    with MemoryIndex.create(str(folder), spec, vector_size=3, retrieval_encoder="axes",
                            codec="exact") as index:
        index.add(chunks, spans, torch.eye(3).numpy(), spec=spec)
        with SpanChat(backbone, index) as chat:
            model = ChatCtxcomp(chat, max_tokens=16)
            documents = [Document(c.text) for c in chunks]
            marked = SpanDocumentCompressor(chat).compress_documents(documents, "")
            assert all("ctxcomp_ref" in d.metadata for d in marked)
            prompt = SpanPrompt(PROMPT)
            said = [model.invoke(prompt.invoke({"context": given, "question": QUESTIONS[0]})) for given in
                    (marked, documents)]
    assert said[0].response_metadata["ctxcomp"]["spans"] == 3
    assert said[1].response_metadata["ctxcomp"]["spans"] == 0
    assert said[0].content == said[1].content


def test_neighbouring_messages_of_one_role_become_one_turn(setup: Setup) -> None:
    model = setup.model()
    once = model.invoke([SystemMessage("Be brief."), HumanMessage("One.\n\nTwo.")])
    twice = model.invoke([SystemMessage("Be brief."), HumanMessage("One."), HumanMessage("Two.")])
    assert isinstance(once.content, str)
    assert twice.usage_metadata == once.usage_metadata or twice.content == once.content
