"""Usage: what the decoder read, and how much of it cost nothing because it came as stored keys and values."""

from __future__ import annotations

from pathlib import Path

import pytest
from li_setup import CORPUS, QUESTIONS, RecordingLLM, Setup
from llama_index.core.callbacks import CallbackManager, TokenCountingHandler
from llama_index.core.llms import ChatMessage, ChatResponse, TextBlock
from llama_index.core.schema import NodeWithScore

from ctxcomp_rag import CompressedRAG, Document, SpanChat
from llama_index_ctxcomp import SpanBlock, SpanNode, SpanPostprocessor, SpanVectorStore


def request(chat: SpanChat) -> list[ChatMessage]:
    nodes = [NodeWithScore(node=n) for n in SpanVectorStore(chat.index).get_nodes()[:2]]
    spans = [SpanBlock(n.node.minted) for n in SpanPostprocessor(chat).postprocess_nodes(nodes)
             if isinstance(n.node, SpanNode)]
    return [ChatMessage(role="user", blocks=[*spans, TextBlock(text=f"\n\nQuestion: {QUESTIONS[0]}")])]


def cached(response: ChatResponse) -> int:
    assert response.additional_kwargs["prompt_tokens_details"] == response.raw["usage"]["prompt_tokens_details"]
    found: int = response.raw["usage"]["prompt_tokens_details"]["cached_tokens"]
    return found


def test_slots_that_go_through_the_layers_are_not_cached(setup: Setup) -> None:
    response = setup.llm().chat(request(setup.chat))
    assert response.raw["ctxcomp"]["slots"] > 0
    assert cached(response) == 0


def test_prerolled_spans_are_cached_from_the_second_call_on(setup: Setup) -> None:
    chat = SpanChat(setup.rag.backbone, setup.rag.memory, prerolled_bytes=2**24)
    llm = RecordingLLM(chat, max_tokens=4)
    first, second = (llm.chat(request(chat)) for _ in range(2))
    chat.scheduler.close()
    assert (cached(first), cached(second)) == (0, first.raw["ctxcomp"]["slots"])
    assert second.message.content == first.message.content


@pytest.fixture
def stored(setup: Setup, tmp_path: Path):  # type: ignore[no-untyped-def]
    """An index of keys and values."""
    with CompressedRAG.create(tmp_path / "kv", compressor="infinipot", budget="16slots",
                              encoder=setup.rag.encoder) as rag:
        rag.index([Document(d.id, d.text) for d in CORPUS[:2]])
        with SpanChat(rag.backbone, rag.memory) as chat:
            yield chat


async def test_stored_keys_and_values_are_cached_on_every_path(stored: SpanChat) -> None:
    llm = RecordingLLM(stored, max_tokens=4)
    whole = llm.chat(request(stored))
    assert cached(whole) == whole.raw["ctxcomp"]["slots"] == 32
    assert whole.raw["usage"]["prompt_tokens"] == 32 + whole.raw["ctxcomp"]["text_tokens"]
    assert (await llm.achat(request(stored))).raw == whole.raw
    assert list(llm.stream_chat(request(stored)))[-1].raw == whole.raw
    assert [r async for r in await llm.astream_chat(request(stored))][-1].raw == whole.raw


def test_a_span_that_becomes_text_is_not_counted_as_cached(stored: SpanChat) -> None:
    message = request(stored)
    stored.references.revoke(chunk_id=next(iter(stored.index.chunks())).id)
    response = RecordingLLM(stored, max_tokens=4).chat(message)
    assert response.raw["ctxcomp"]["rejected"] == {"unknown": 1}
    assert cached(response) == 16


def test_the_frameworks_token_counter_counts_positions(setup: Setup) -> None:
    counter = TokenCountingHandler()
    llm = RecordingLLM(setup.chat, max_tokens=4, callback_manager=CallbackManager([counter]))
    response = llm.chat(request(setup.chat))
    assert counter.prompt_llm_token_count == response.raw["usage"]["prompt_tokens"]
    assert counter.completion_llm_token_count == response.raw["usage"]["completion_tokens"]
