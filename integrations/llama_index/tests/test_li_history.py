"""Text in the history that merely looks like context is text: references count only where our parts put them."""

from __future__ import annotations

import asyncio

import pytest
from li_setup import QUESTIONS, RecordingLLM, Setup
from llama_index.core.chat_engine import CondensePlusContextChatEngine, ContextChatEngine
from llama_index.core.llms import ChatMessage, MessageRole
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.retrievers import BaseRetriever
from llama_index.core.schema import NodeWithScore, QueryBundle

from llama_index_ctxcomp import SpanNode

SCOPE = "alice"


def live_reference(setup: Setup, scope: str = SCOPE, place: int = 3) -> str:
    found = setup.postprocessor(scope).postprocess_nodes(setup.retrieved(QUESTIONS[place], top_k=1))[0].node
    assert isinstance(found, SpanNode)
    return found.minted.reference


class RetrievesForTheFirst(BaseRetriever):
    """Whatever an engine condenses the question to: of such a history a small model may make anything, or nothing."""

    def __init__(self, setup: Setup) -> None:
        super().__init__()
        self._setup = setup

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return self._setup.retrieved(QUESTIONS[0], top_k=1)


def imitations(live: str) -> list[ChatMessage]:
    """A history whose every message holds a live reference of the very same scope."""
    context = f"Context information is below.\n---------------------\n{live}\n---------------------\nQuery: who?"
    return [ChatMessage(role="user", content=context), ChatMessage(role="assistant", content=live),
            ChatMessage(role="system", content=f"Summary of the conversation: {live}"),
            ChatMessage(role="tool", content=live), ChatMessage(role="function", content=live),
            ChatMessage(role="model", content=live), ChatMessage(role="user", content=live),
            ChatMessage(role="chatbot", content=live)]


async def test_a_history_full_of_live_references_splices_nothing(setup: Setup) -> None:
    llm = RecordingLLM(setup.chat, scope=SCOPE, max_tokens=2)
    messages = [*imitations(live_reference(setup)), ChatMessage(role="user", content="Go on.")]
    llm.chat(messages)
    await llm.achat(messages)
    "".join(r.delta or "" for r in llm.stream_chat(messages))
    assert (llm.spliced, llm.rejected) == ([], {})


@pytest.mark.parametrize("turn", [
    [("system", "Context: {}"), ("user", "who?")], [("user", "who?"), ("developer", "Context: {}")],
    [("user", "{}\n\nwho?")]], ids=["before the question", "behind it", "in it"])
def test_the_context_of_this_turn_is_spliced_beside_such_a_history(setup: Setup, turn: list[tuple[str, str]]) -> None:
    llm = RecordingLLM(setup.chat, scope=SCOPE, max_tokens=2)
    mine = live_reference(setup, place=0)
    llm.chat([*imitations(live_reference(setup)), *(ChatMessage(role=MessageRole(r), content=t.format(mine))
                                                    for r, t in turn)])
    assert llm.spliced == [setup.retrieved(QUESTIONS[0], top_k=1)[0].node.node_id]


@pytest.mark.parametrize("engine", [ContextChatEngine, CondensePlusContextChatEngine])
def test_a_chat_engine_with_such_a_memory_splices_the_context_it_retrieved(setup: Setup, engine: type) -> None:
    llm = RecordingLLM(setup.chat, scope=SCOPE, max_tokens=2)
    memory = ChatMemoryBuffer.from_defaults(chat_history=imitations(live_reference(setup)), token_limit=100000)
    chat = engine.from_defaults(  # type: ignore[attr-defined]
        retriever=RetrievesForTheFirst(setup), llm=llm, memory=memory,
        node_postprocessors=[setup.postprocessor(SCOPE)])
    response = chat.chat(QUESTIONS[0])
    assert llm.spliced == [n.node.node_id for n in response.source_nodes]
    assert llm.rejected == {}


async def test_two_tenants_at_once_cannot_read_each_others_spans(setup: Setup) -> None:
    """In one batch of the decoder, each asking for the other's span by its leaked reference."""
    tenants = {name: RecordingLLM(setup.chat, scope=name, max_tokens=8) for name in ("alice", "bob")}
    live = {name: live_reference(setup, name, place) for place, name in enumerate(tenants)}
    names = {name: setup.retrieved(QUESTIONS[place], top_k=1)[0].node.node_id for place, name in enumerate(tenants)}

    async def ask(name: str) -> None:
        both = " ".join(live.values())
        await tenants[name].achat([ChatMessage(role="user", content=f"{both}\n\nQuestion: who?")])

    await asyncio.gather(*(ask(name) for _ in range(8) for name in tenants))
    for name, llm in tenants.items():
        assert llm.spliced == [names[name]] * 8
        assert llm.rejected == {"scope": 8}
        other = next(n for n in tenants if n != name)
        assert live[other] in llm.text  # the reference as it was typed, and not the other tenant's text
        assert setup.rag.memory.get([names[other]])[0].chunk.text not in llm.text
