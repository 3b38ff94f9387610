"""Postprocessor and model in several processes: what one mints under the common key, the other accepts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from li_setup import QUESTIONS, SHORT, RecordingLLM, Setup
from llama_index.core.llms import ChatMessage
from llama_index.core.query_engine import RetrieverQueryEngine

from ctxcomp_rag import SpanChat
from llama_index_ctxcomp import PromptError, SpanPostprocessor, SpanSynthesizer
from tests.processes import KEY, Make, chats_under_a_key

SCOPE = "tenant-7"
RETRIEVER_PROCESS = """
import json, os, sys
from llama_index.core import VectorStoreIndex
from llama_index.core.schema import MetadataMode
from ctxcomp_rag import SpanChat, SpanReferences
from tests.processes import KEY, Make, chats_under_a_key
from llama_index_ctxcomp import EncoderEmbedding, SpanPostprocessor, SpanVectorStore
references = SpanReferences("kb", mode="mac", key=bytes.fromhex(os.environ["SPAN_KEY"]))
chat = SpanChat.open(sys.argv[1], references=references)
index = VectorStoreIndex.from_vector_store(SpanVectorStore(chat.index), embed_model=EncoderEmbedding())
found = index.as_retriever(similarity_top_k=3).retrieve(sys.argv[2])
nodes = SpanPostprocessor(chat, scope=sys.argv[3]).postprocess_nodes(found)
sys.stdout.write(json.dumps([n.node.get_content(metadata_mode=MetadataMode.LLM) for n in nodes]))
"""


@pytest.fixture
def process(setup: Setup) -> Iterator[Make]:
    """Makes a `SpanChat` as another process would have it."""
    with chats_under_a_key(setup.rag) as make:
        yield make


def engine(setup: Setup, minting: SpanChat, llm: RecordingLLM, scope: str | None = SCOPE,
           streaming: bool = False) -> RetrieverQueryEngine:
    return RetrieverQueryEngine(setup.store_index().as_retriever(similarity_top_k=3),
                                SpanSynthesizer(llm, streaming=streaming), [SpanPostprocessor(minting, scope=scope)])


def test_a_model_reads_what_another_process_has_minted(setup: Setup, process: Make) -> None:
    sent = subprocess.run(
        [sys.executable, "-c", RETRIEVER_PROCESS, str(setup.rag.memory.path), QUESTIONS[0], SCOPE], check=True,
        capture_output=True, text=True,
        env={**os.environ, "SPAN_KEY": KEY.hex(), "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}).stdout
    llm = RecordingLLM(process(), scope=SCOPE, max_tokens=SHORT.max_new_tokens)
    context = "\n\n".join(json.loads(sent))
    assert context.count("[[span:") == 3
    said = llm.chat([ChatMessage(role="user", content=f"{context}\n\nQuestion: {QUESTIONS[0]}")])
    assert said.message.content == setup.answer(QUESTIONS[0])
    assert (len(llm.spliced), llm.rejected) == (3, {})


@pytest.mark.parametrize("scope", [SCOPE, None], ids=["tenant", "one call"])
async def test_a_query_engine_over_two_sets_of_references_with_one_key(setup: Setup, process: Make,
                                                                       scope: str | None) -> None:
    expected = setup.answer(QUESTIONS[0])
    llm = RecordingLLM(process(), scope=scope, max_tokens=SHORT.max_new_tokens)
    whole = engine(setup, process(), llm, scope)
    assert whole.query(QUESTIONS[0]).response == expected
    assert (await whole.aquery(QUESTIONS[0])).response == expected  # type: ignore[union-attr]
    streamed = engine(setup, process(), llm, scope, streaming=True).query(QUESTIONS[0])
    assert "".join(streamed.response_gen) == expected  # type: ignore[union-attr]
    assert (len(llm.spliced), llm.rejected) == (9, {})


@pytest.mark.parametrize("why", ["foreign key", "expired", "other scope", "minted ahead of time"])
@pytest.mark.parametrize("on_invalid", ["text", "raise"])
def test_what_the_key_does_not_open_stays_text_or_raises_and_is_counted(setup: Setup, process: Make, why: str,
                                                                        on_invalid: str) -> None:
    hours = {"expired": -1, "minted ahead of time": 1}.get(why, 0)
    minting = process(key=bytes(32) if why == "foreign key" else KEY, clock=lambda: time.time() + 3600 * hours)
    reading = process(on_invalid=on_invalid)
    llm = RecordingLLM(reading, scope="tenant-8" if why == "other scope" else SCOPE, max_tokens=SHORT.max_new_tokens)
    if on_invalid == "raise":
        with pytest.raises(PromptError, match="is forged, expired, revoked, or of another scope"):
            engine(setup, minting, llm).query(QUESTIONS[0])
        assert reading.references.rejected == {"unknown": 1}
        return
    response = engine(setup, minting, llm).query(QUESTIONS[0])
    assert (llm.spliced, llm.rejected) == ([], {"unknown": 3})
    assert reading.references.rejected == {"unknown": 3}
    assert response.response == setup.rag.answer(QUESTIONS[0], mode="text", settings=SHORT).text
