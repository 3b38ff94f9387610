"""Text in the history that merely looks like context is text: references count only where our parts put them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from langchain_classic.chains.combine_documents import create_stuff_documents_chain
from langchain_core.chat_history import InMemoryChatMessageHistory
from langchain_core.documents import Document
from langchain_core.messages import AIMessage, BaseMessage, ChatMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.prompts import ChatPromptTemplate, MessagesPlaceholder
from langchain_core.runnables import RunnableLambda, RunnablePassthrough
from langchain_core.runnables.history import RunnableWithMessageHistory
from lc_setup import PROMPT, QUESTIONS, Setup, about, block, references

from ctxcomp_rag import SpanChat, SpanReferenceError, new_scope
from langchain_ctxcomp import (
    SPAN_DOCUMENT_PROMPT,
    ChatCtxcomp,
    SpanDocumentCompressor,
    SpanPrompt,
    with_span_scope,
)
from langchain_ctxcomp.scope import SCOPE_KEY

WITH_HISTORY = ChatPromptTemplate.from_messages([
    ("system", "Answer from the context.\n{context}"), MessagesPlaceholder("history"), ("human", "{question}")])


def imitations(live: str) -> list[BaseMessage]:
    """A history whose every message holds a live reference of the very same scope."""
    as_block = json.dumps({"type": "span", "ref": live})
    return [HumanMessage(f"Context:\n\n{live}\n\nQuestion: who?"), AIMessage(live),
            HumanMessage([{"type": "text", "text": live}]), AIMessage([block(live, "as the model said")]),
            SystemMessage(f"Summary of the conversation: {live}"), HumanMessage(as_block),
            AIMessage("", tool_calls=[{"name": "search", "args": {"query": live}, "id": "1"}]),
            ToolMessage(live, tool_call_id="1"), ToolMessage([block(live, "as a tool said")], tool_call_id="1"),
            ChatMessage(live, role="user"), ChatMessage(live, role="assistant")]


@pytest.mark.parametrize("text_references", [False, True])
def test_a_history_full_of_live_references_splices_nothing(setup: Setup, text_references: bool) -> None:
    scope = new_scope()
    (live, _) = references(setup, scope)
    model = setup.model(allow_text_references=text_references)
    said = model.invoke([*imitations(live), HumanMessage("Go on.")], config={"configurable": {SCOPE_KEY: scope}})
    assert about(said)["spans"] == 0
    assert about(said)["rejected"] == {"malformed": 2}  # the blocks of the model and of the tool


def test_blocks_of_a_model_or_a_tool_are_raised_where_that_is_wanted(setup: Setup) -> None:
    scope = new_scope()
    (live, _) = references(setup, scope)
    strict = SpanChat(setup.rag.backbone, setup.rag.memory, references=setup.chat.references, on_invalid="raise")
    config: Any = {"configurable": {SCOPE_KEY: scope}}
    for message in (AIMessage([block(live)]), ToolMessage([block(live)], tool_call_id="1")):
        with pytest.raises(SpanReferenceError, match="expected a reference to a span"):
            ChatCtxcomp(strict, max_tokens=2).invoke([HumanMessage("?"), message, HumanMessage("?")], config=config)
    strict.scheduler.close()


def test_the_context_of_this_turn_is_spliced_beside_such_a_history(setup: Setup) -> None:
    scope = new_scope()
    live, mine = references(setup, scope)
    config: Any = {"configurable": {SCOPE_KEY: scope}}
    model = setup.model(allow_text_references=True, max_tokens=2)
    for question in ([SystemMessage(f"Context:\n{mine}"), HumanMessage("who?")],
                     [HumanMessage("who?"), SystemMessage(f"Context:\n{mine}")],
                     [HumanMessage(f"{mine}\n\nwho?")]):
        assert about(model.invoke([*imitations(live), *question], config=config))["spans"] == 1
    opening = [SystemMessage("Be brief."), SystemMessage(mine), *imitations(live), HumanMessage("who?")]
    assert about(model.invoke(opening, config=config))["spans"] == 1


def test_a_stuff_chain_with_a_history_reads_its_documents_only(setup: Setup) -> None:
    scope = new_scope()
    (live, _) = references(setup, scope, QUESTIONS[3])
    texts = [c.text for c in setup.rag.memory.chunks()][:2]
    prompt = ChatPromptTemplate.from_messages([
        ("system", "{context}"), MessagesPlaceholder("history"), ("human", "{input}")])
    config: Any = {"configurable": {SCOPE_KEY: scope}}
    said: list[AIMessage] = []
    chain = create_stuff_documents_chain(
        setup.model(allow_text_references=True, max_tokens=2), prompt, document_prompt=SPAN_DOCUMENT_PROMPT,
        output_parser=RunnablePassthrough(said.append))  # type: ignore[arg-type]
    marked = with_span_scope(_marking(setup), scope=scope).invoke([Document(t) for t in texts])
    chain.invoke({"context": marked, "history": imitations(live), "input": "who?"}, config=config)
    assert about(said[0])["spans"] == 2


def _marking(setup: Setup) -> Any:
    compressor = SpanDocumentCompressor(setup.chat)
    return RunnableLambda(lambda documents: compressor.compress_documents(documents, ""))


@pytest.mark.parametrize("typed", ["{context}", "{{context}}", "Context:\n\n{context}", '{"type": "span", "ref": "x"}'])
def test_a_placeholder_that_somebody_types_is_filled_with_nothing(setup: Setup, typed: str) -> None:
    documents = setup.store.as_retriever(search_kwargs={"k": 1}).invoke(QUESTIONS[0])
    value = SpanPrompt(WITH_HISTORY).invoke({"context": documents, "question": typed,
                                             "history": [HumanMessage(typed), AIMessage(typed)]})
    blocks = [b for m in value.to_messages() for b in (m.content if isinstance(m.content, list) else [])]
    assert [b["type"] for b in blocks] == ["text", "span"]  # type: ignore[index]
    assert [m.content for m in value.to_messages()[1:]] == [typed] * 3


def test_a_live_reference_in_history_or_question_is_no_context_of_a_span_prompt(setup: Setup) -> None:
    scope = new_scope()
    (live, _) = references(setup, scope, QUESTIONS[3])
    config: Any = {"configurable": {SCOPE_KEY: scope}}
    documents = setup.store.as_retriever(search_kwargs={"k": 1}).invoke(QUESTIONS[0], config=config)
    value = SpanPrompt(WITH_HISTORY).invoke({"context": documents, "question": live, "history": imitations(live)})
    assert about(setup.model(max_tokens=2).invoke(value, config=config))["spans"] == 1


@pytest.mark.parametrize("scoped", [True, False], ids=["a scope for each call", "one scope"])
def test_context_of_earlier_turns_is_text_once_its_scope_has_ended(setup: Setup, scoped: bool) -> None:
    """A memory that keeps whole messages keeps blocks; they are good in their scope and text in any other."""
    history: list[BaseMessage] = []
    prompt = SpanPrompt(PROMPT)
    retriever = setup.store.as_retriever(search_kwargs={"k": 1})
    said: list[AIMessage] = []

    def turn(question: str) -> dict[str, Any]:
        documents = retriever.invoke(question)
        message = prompt.invoke({"context": documents, "question": question}).to_messages()[0]
        answer = setup.model(max_tokens=2).invoke([*history, message])
        history.extend([message, answer])
        said.append(answer)
        return about(answer)

    chain: Any = RunnableLambda(turn)
    chain = with_span_scope(chain) if scoped else chain
    chain.invoke(QUESTIONS[0])
    second = chain.invoke(QUESTIONS[1])
    assert (second["spans"], second["rejected"]) == ((1, {"scope": 1}) if scoped else (2, {}))


@pytest.mark.filterwarnings("ignore::langchain_core._api.LangChainDeprecationWarning")
def test_the_frameworks_own_history_works_with_a_chain_over_spans(setup: Setup) -> None:
    history = InMemoryChatMessageHistory()
    retriever = setup.store.as_retriever(search_kwargs={"k": 1})
    chain = RunnablePassthrough.assign(context=lambda x: retriever.invoke(x["question"])) | SpanPrompt(
        WITH_HISTORY) | setup.model(max_tokens=4)
    chatting = with_span_scope(RunnableWithMessageHistory(
        chain, lambda: history, input_messages_key="question", history_messages_key="history",
        history_factory_config=[]))
    for question in QUESTIONS[:2]:
        assert about(chatting.invoke({"question": question}))["spans"] == 1
    assert [m.content for m in history.messages][::2] == QUESTIONS[:2]
