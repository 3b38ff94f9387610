"""Retriever and model in several processes: what one mints under the common key, the other accepts in that scope."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from langchain_core.documents import Document
from langchain_core.load import dumps
from langchain_core.messages import HumanMessage
from lc_setup import PROMPT, QUESTIONS, Setup, about, block

from ctxcomp_rag import GenerationSettings, SpanChat, SpanReferenceError, SpanReferences
from langchain_ctxcomp import SPAN_DOCUMENT_PROMPT, ChatCtxcomp, SpanPrompt, SpanVectorStore
from langchain_ctxcomp.scope import SCOPE_KEY
from tests.processes import KEY, Make, chats_under_a_key

SCOPE = "tenant-7"
CONFIG: Any = {"configurable": {SCOPE_KEY: SCOPE}}
RETRIEVER_PROCESS = """
import json, os, sys
from ctxcomp_rag import SpanChat, SpanReferences
from langchain_ctxcomp import EncoderEmbeddings, SpanVectorStore
references = SpanReferences("kb", mode="mac", key=bytes.fromhex(os.environ["SPAN_KEY"]))
chat = SpanChat.open(sys.argv[1], references=references)
retriever = SpanVectorStore(chat.index, EncoderEmbeddings(), chat=chat).as_retriever(search_kwargs={"k": 3})
found = retriever.invoke(sys.argv[2], config={"configurable": {"__ctxcomp_scope": sys.argv[3]}})
sys.stdout.write(json.dumps([d.model_dump() for d in found]))
"""


@pytest.fixture
def process(setup: Setup) -> Iterator[Make]:
    """Makes a `SpanChat` as another process would have it."""
    with chats_under_a_key(setup.rag) as make:
        yield make


def retrieved(setup: Setup, chat: SpanChat) -> Any:
    store = SpanVectorStore(setup.rag.memory, setup.embeddings, chat=chat)
    return store.as_retriever(search_kwargs={"k": 3}).invoke(QUESTIONS[0], config=CONFIG)


def test_a_chain_reads_what_a_retriever_in_another_process_has_minted(setup: Setup, process: Make) -> None:
    sent = subprocess.run(
        [sys.executable, "-c", RETRIEVER_PROCESS, str(setup.rag.memory.path), QUESTIONS[0], SCOPE], check=True,
        capture_output=True, text=True,
        env={**os.environ, "SPAN_KEY": KEY.hex(), "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}).stdout
    documents = [Document(**d) for d in json.loads(sent)]  # nothing but JSON has crossed the border
    expected = setup.rag.answer(QUESTIONS[0], settings=GenerationSettings(max_new_tokens=16))
    chain = SpanPrompt(PROMPT) | ChatCtxcomp(process(), max_tokens=16)
    said = chain.invoke({"context": documents, "question": QUESTIONS[0]}, config=CONFIG)
    assert (said.content, about(said)["spans"], about(said)["rejected"]) == (expected.text, 3, {})
    assert [d.page_content for d in documents] == [s.chunk.text for s in expected.sources]


async def test_every_path_of_the_model_accepts_them(setup: Setup, process: Make) -> None:
    documents = retrieved(setup, process())
    message = SpanPrompt(PROMPT).invoke({"context": documents, "question": QUESTIONS[0]})
    model = ChatCtxcomp(process(), max_tokens=4)
    expected = model.invoke(message, config=CONFIG)
    assert about(expected)["spans"] == 3
    assert (await model.ainvoke(message, config=CONFIG)).content == expected.content
    assert [m.content for m in model.batch([message], config=CONFIG)] == [expected.content]
    assert "".join(str(c.content) for c in model.stream(message, config=CONFIG)) == expected.content
    as_text = "\n\n".join(SPAN_DOCUMENT_PROMPT.format(**d.metadata) for d in documents)
    by_text = ChatCtxcomp(process(), max_tokens=4, allow_text_references=True).invoke(
        f"{as_text}\n\nQuestion: {QUESTIONS[0]}", config=CONFIG)
    assert (by_text.content, about(by_text)["spans"]) == (expected.content, 3)


@pytest.mark.parametrize("why", ["foreign key", "expired", "other scope", "minted ahead of time"])
@pytest.mark.parametrize("on_invalid", ["text", "raise"])
def test_what_the_key_does_not_open_stays_text_or_raises_and_is_counted(setup: Setup, process: Make, why: str,
                                                                        on_invalid: str) -> None:
    hours = {"expired": -1, "minted ahead of time": 1}.get(why, 0)
    minting = process(key=bytes(32) if why == "foreign key" else KEY, clock=lambda: time.time() + 3600 * hours)
    documents = retrieved(setup, minting)
    message = SpanPrompt(PROMPT).invoke({"context": documents, "question": QUESTIONS[0]})
    config: Any = {"configurable": {SCOPE_KEY: "tenant-8"}} if why == "other scope" else CONFIG
    reading = process(on_invalid=on_invalid)
    model = ChatCtxcomp(reading, max_tokens=16)
    if on_invalid == "raise":
        with pytest.raises(SpanReferenceError, match="is forged, expired, revoked, or of another scope"):
            model.invoke(message, config=config)
        assert reading.references.rejected == {"unknown": 1}
        return
    said = model.invoke(message, config=config)
    assert (about(said)["spans"], about(said)["rejected"]) == (0, {"unknown": 3})
    assert reading.references.rejected == {"unknown": 3}
    plain = setup.rag.answer(QUESTIONS[0], mode="text", settings=GenerationSettings(max_new_tokens=16))
    assert said.content == plain.text


def test_two_indexes_under_one_key_do_not_mix(setup: Setup, process: Make) -> None:
    elsewhere = SpanReferences("another index", mode="mac", key=KEY)
    (chunk, *_) = setup.rag.memory.chunks()
    said = ChatCtxcomp(process(), max_tokens=2).invoke([HumanMessage([block(elsewhere.mint(chunk.id, SCOPE))])],
                                                       config=CONFIG)
    assert about(said)["rejected"] == {"unknown": 1}


def test_no_key_is_in_a_trace_or_in_the_cache_key(setup: Setup, process: Make) -> None:
    model = ChatCtxcomp(process())
    shown = f"{model!r}{model._identifying_params}{model._get_llm_string()}{dumps(model)}{process().references!r}"
    assert not any(secret in shown for secret in (KEY.hex(), repr(KEY)[2:-1], SCOPE))
    assert Path(str(model._identifying_params["index"])) == setup.rag.memory.path
