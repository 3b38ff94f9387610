"""The synthesizers of llama_index over references as text: references arrive whole, or a sentence says why not."""

from __future__ import annotations

import pytest
from li_setup import QUESTIONS, RecordingLLM, Setup, node
from llama_index.core.chat_engine import CondensePlusContextChatEngine, ContextChatEngine
from llama_index.core.response_synthesizers import get_response_synthesizer
from llama_index.core.schema import MetadataMode, NodeWithScore

from ctxcomp_rag import InputError, SpanChat
from llama_index_ctxcomp import PromptError, SpanPostprocessor, span_prompt_helper

SCOPE = "tenant-1"
MODES = ["compact", "refine", "tree_summarize", "accumulate", "compact_accumulate"]


@pytest.mark.parametrize("mixed", [False, True], ids=["all spans", "spans and text"])
@pytest.mark.parametrize("window", [2048, 860, 200])
@pytest.mark.parametrize("mode", MODES)
def test_every_reference_is_spliced_once_or_the_window_is_named(setup: Setup, mode: str, window: int,
                                                                mixed: bool) -> None:
    llm = RecordingLLM(setup.chat, scope=SCOPE, max_tokens=2)
    helper = span_prompt_helper(llm)
    helper.context_window = window
    found = setup.retrieved(QUESTIONS[0], top_k=4)
    if mixed:
        found.insert(1, NodeWithScore(node=node("The harbour of Ostrava has no lighthouse.", "other")))
    nodes = setup.postprocessor(SCOPE).postprocess_nodes(found)
    synthesizer = get_response_synthesizer(llm=llm, response_mode=mode, prompt_helper=helper)  # type: ignore[arg-type]
    if window == 200:
        with pytest.raises(InputError, match="positions"):
            synthesizer.synthesize(QUESTIONS[0], nodes)
        return
    synthesizer.synthesize(QUESTIONS[0], nodes)
    assert sorted(llm.spliced) == sorted(n.node.node_id for n in nodes if n.node.ref_doc_id != "other")
    assert llm.rejected == {}
    assert "[[span:" not in llm.text
    assert ("Ostrava" in llm.text) == mixed


def test_a_small_window_takes_more_calls_and_no_call_overflows(setup: Setup) -> None:
    nodes = setup.postprocessor(SCOPE).postprocess_nodes(setup.retrieved(QUESTIONS[0], top_k=4))
    calls = {}
    for window in (2048, 860):
        llm = RecordingLLM(setup.chat, scope=SCOPE, max_tokens=2)
        helper = span_prompt_helper(llm)
        helper.context_window = window
        get_response_synthesizer(llm=llm, prompt_helper=helper).synthesize(QUESTIONS[0], nodes)
        calls[window] = len(llm._prompts)
        for prompt in llm._prompts:
            assert setup.chat.scheduler.decoder.splice(prompt.parts).next_position <= window
    assert calls[2048] == 1
    assert calls[860] > 1


@pytest.mark.parametrize("on_invalid", ["text", "raise"])
def test_the_default_prompt_helper_may_cut_a_reference_and_that_is_counted_or_raised(setup: Setup,
                                                                                     on_invalid: str) -> None:
    from llama_index.core.indices.prompt_helper import PromptHelper

    chat = SpanChat(setup.rag.backbone, setup.rag.memory, on_invalid=on_invalid)  # type: ignore[arg-type]
    llm = RecordingLLM(chat, scope=SCOPE, max_tokens=2)
    nodes = SpanPostprocessor(chat, scope=SCOPE).postprocess_nodes(setup.retrieved(QUESTIONS[0], top_k=2))
    helper = PromptHelper.from_llm_metadata(llm.metadata, chunk_size_limit=8)
    synthesizer = get_response_synthesizer(llm=llm, prompt_helper=helper)
    if on_invalid == "raise":
        with pytest.raises(PromptError, match="reference to a span was cut"):
            synthesizer.synthesize(QUESTIONS[0], nodes)
    else:
        synthesizer.synthesize(QUESTIONS[0], nodes)
        assert llm.spliced == []
        assert llm.rejected.keys() == {"cut"}
    chat.scheduler.close()


def test_without_a_scope_the_synthesizers_of_the_framework_read_the_text(setup: Setup) -> None:
    llm = RecordingLLM(setup.chat, max_tokens=2)
    nodes = setup.postprocessor().postprocess_nodes(setup.retrieved(QUESTIONS[0], top_k=1))
    get_response_synthesizer(llm=llm).synthesize(QUESTIONS[0], nodes)
    assert llm.spliced == []
    assert nodes[0].node.text in llm.text
    with pytest.raises(InputError, match=r"only within a scope; pass CtxcompLLM\(chat, scope"):
        span_prompt_helper(llm)


def test_a_model_without_the_postprocessors_scope_says_so(setup: Setup) -> None:
    nodes = setup.postprocessor(SCOPE).postprocess_nodes(setup.retrieved(QUESTIONS[0], top_k=1))
    with pytest.raises(PromptError, match="came as text, but this model was given no scope"):
        get_response_synthesizer(llm=setup.llm()).synthesize(QUESTIONS[0], nodes)


def test_a_stream_of_the_framework_outlives_its_references_as_text(setup: Setup) -> None:
    llm = RecordingLLM(setup.chat, scope="short-lived", max_tokens=2)
    nodes = setup.postprocessor("short-lived").postprocess_nodes(setup.retrieved(QUESTIONS[0], top_k=2))
    response = get_response_synthesizer(llm=llm, streaming=True, prompt_helper=span_prompt_helper(llm)).synthesize(
        QUESTIONS[0], nodes)
    setup.chat.references.revoke(scope="short-lived")
    "".join(response.response_gen)  # type: ignore[union-attr]
    assert llm.spliced in ([], [n.node.node_id for n in nodes])  # resolved before the scope ended, or not at all
    if not llm.spliced:
        assert llm.rejected == {"unknown": 2}
        assert all(n.node.text in llm.text for n in nodes)
    assert "[[span:" not in llm.text


@pytest.mark.parametrize("engine", [ContextChatEngine, CondensePlusContextChatEngine])
async def test_chat_engines_splice_the_context_of_each_turn(setup: Setup, engine: type) -> None:
    llm = RecordingLLM(setup.chat, scope=SCOPE, max_tokens=2)
    chat = engine.from_defaults(  # type: ignore[attr-defined]
        retriever=setup.store_index().as_retriever(similarity_top_k=2), llm=llm,
        node_postprocessors=[setup.postprocessor(SCOPE)])
    first = chat.chat(QUESTIONS[0])
    assert llm.spliced == [n.node.node_id for n in first.source_nodes]
    streamed = await chat.astream_chat(QUESTIONS[1])
    assert [token async for token in streamed.async_response_gen()]
    assert len(llm.spliced) == 4
    assert llm.rejected == {}
    assert "[[span:" not in llm.text


def test_the_embedding_text_of_a_node_holds_no_reference(setup: Setup) -> None:
    found = setup.postprocessor(SCOPE).postprocess_nodes(setup.retrieved(QUESTIONS[0], top_k=1))[0].node
    assert "[[span:" in found.get_content(metadata_mode=MetadataMode.LLM)
    for mode in (MetadataMode.EMBED, MetadataMode.ALL, MetadataMode.NONE):
        assert "[[span:" not in found.get_content(metadata_mode=mode)
    assert "[[span:" not in found.model_dump_json()
    assert "[[span:" not in repr(found)
